"""Kernel distances against torchmetrics and against double loops."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from ccmdist.evaluation.fidelity import kernels
from ccmdist.evaluation.fidelity.kernels import cmmd, kernel_distance
from tests.unit.evaluation.fidelity.test_fidelity_frechet import Pixels, images_and_features


def looped(first, second, kernel):
    """The unbiased estimate, pair by pair."""

    def mean_within(values):
        pairs = [kernel(a, b) for i, a in enumerate(values) for j, b in enumerate(values) if i != j]
        return np.mean(pairs)

    across = np.mean([kernel(a, b) for a in first for b in second])
    return mean_within(first) + mean_within(second) - 2 * across


def test_the_kernel_distance_is_that_of_torchmetrics_and_of_a_double_loop():
    (real, first), (synthetic, second) = images_and_features(40, 1), images_and_features(40, 2)
    # One subset of all images, whose order does not matter.
    judge = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=40).set_dtype(torch.float64)
    judge.update(real, real=True)
    judge.update(synthetic, real=False)
    assert kernel_distance(first, second) == pytest.approx(float(judge.compute()[0]), rel=1e-6)
    naive = looped(first, second, lambda a, b: (a @ b / len(a) + 1) ** 3)
    assert kernel_distance(first, second) == pytest.approx(naive, rel=1e-9)


def test_the_cmmd_is_that_of_a_double_loop_over_embeddings_of_unit_length():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(17, 12)), rng.normal(0.5, 1, size=(23, 12))
    unit = [values / np.linalg.norm(values, axis=1, keepdims=True) for values in (first, second)]
    naive = 1000 * looped(*unit, lambda a, b: np.exp(-((a - b) ** 2).sum() / 200))
    # Kernel values near 1 are subtracted from each other, which leaves six digits.
    assert cmmd(first, second) == pytest.approx(naive, rel=1e-6)
    assert cmmd(3 * first, second) == pytest.approx(cmmd(first, second), rel=1e-6)


def test_sets_larger_than_a_block_give_the_same(monkeypatch):
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(50, 5)), rng.normal(0.3, 1, size=(41, 5))
    wanted = kernel_distance(first, second), cmmd(first, second)
    monkeypatch.setattr(kernels, "BLOCK_ROWS", 7)
    assert (kernel_distance(first, second), cmmd(first, second)) == pytest.approx(wanted, rel=1e-9)


def test_both_distances_are_unbiased_at_any_number_of_images():
    rng = np.random.default_rng(5)
    for distance in (kernel_distance, cmmd):
        few = [distance(rng.normal(size=(8, 6)), rng.normal(size=(8, 6))) for _ in range(400)]
        # The mean over samples of one distribution is zero within 4 standard errors; a biased one is 15 away.
        assert abs(np.mean(few)) < 4 * np.std(few) / np.sqrt(len(few))
