"""Frechet distances against closed forms and torchmetrics, merged from shards, off few images, and at infinity."""

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from torchmetrics.image.fid import FrechetInceptionDistance

from ccmdist.evaluation.fidelity.frechet import (
    BLOCK_ROWS,
    Moments,
    frechet_at_infinity,
    frechet_distance,
    frechet_of_moments,
)


class Pixels(torch.nn.Module):
    """Eight features of an image that need no weights, for judges that take a network."""

    num_features = 8

    def forward(self, images):
        return images.flatten(1)[:, :8].double() / 64


def images_and_features(num, seed):
    """What Pixels sees of random images: the same numbers for the judge and for us."""
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (num, 3, 4, 4), dtype=np.uint8))
    return images, Pixels()(images).numpy()


def test_the_distance_of_a_set_to_itself_is_zero():
    values = np.random.default_rng(0).normal(size=(50, 5))
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_moved_and_stretched_sets_is_that_of_their_normal_distributions():
    values = np.random.default_rng(1).normal(size=(400, 4))
    assert frechet_distance(values, values + 2) == pytest.approx(16)
    spread = np.trace(np.cov(values, rowvar=False))
    assert frechet_distance(values, values.mean(0) + 3 * (values - values.mean(0))) == pytest.approx(4 * spread)


def test_the_distance_is_that_of_torchmetrics():
    (real, first), (synthetic, second) = images_and_features(60, 2), images_and_features(45, 3)
    judge = FrechetInceptionDistance(feature=Pixels()).set_dtype(torch.float64)
    judge.update(real, real=True)
    judge.update(synthetic, real=False)
    # torchmetrics sums squares and subtracts, which costs it some digits.
    assert frechet_distance(first, second) == pytest.approx(float(judge.compute()), rel=1e-7)


def test_the_distance_is_the_closed_form_of_two_normal_distributions():
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(80, 6)) @ rng.normal(size=(6, 6)), rng.normal(1, 2, size=(70, 6))
    covariances = [np.cov(values, rowvar=False) for values in (first, second)]
    difference = first.mean(0) - second.mean(0)
    root = sqrtm(covariances[0] @ covariances[1]).real
    wanted = difference @ difference + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-9)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 24), st.integers(0, 10**6))
def test_a_distance_merged_from_shards_is_that_of_one_pass_over_all(sizes, dim, seed):
    rng = np.random.default_rng(seed)
    shards = [rng.normal(rng.normal(0, 3), 1, (size, dim)) * 100 for size in [*sizes, 2]]
    values, other = np.concatenate(shards), rng.normal(50, 120, (60, dim))
    merged = reduce(Moments.merged, [Moments.of(shard) for shard in shards])
    single = Moments(len(values), values.mean(0), np.cov(values, rowvar=False).reshape(dim, dim) * (len(values) - 1))
    wanted = frechet_of_moments(single, Moments.of(other))
    assert frechet_of_moments(merged, Moments.of(other)) == pytest.approx(wanted, rel=1e-9)


def test_moments_of_many_images_are_taken_block_by_block():
    values = np.random.default_rng(5).normal(7, 2, (2 * BLOCK_ROWS + 3, 5)).astype(np.float32)
    found = Moments.of(values)
    assert found.num == len(values)
    np.testing.assert_allclose(found.covariance, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-9)


def test_fewer_images_than_features_give_the_distance_of_the_moments():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(20, 50)), rng.normal(0.5, 2, size=(31, 50))
    wanted = frechet_of_moments(Moments.of(first), Moments.of(second))
    # Moments of rank 19 in 50 dimensions lose the roots of small eigenvalues, which the images keep.
    assert frechet_distance(first, second) == pytest.approx(wanted, rel=1e-6)


def test_the_distance_at_infinity_is_free_of_the_bias_that_the_plain_one_has():
    rng = np.random.default_rng(7)
    pairs = rng.normal(size=(20, 2, 200, 10))
    # Samples of one distribution: the plain distance is all bias.
    plain = np.mean([frechet_distance(*pair) for pair in pairs])
    found = [frechet_at_infinity(*pair, rng) for pair in pairs]
    assert plain > 0.3
    # Within 3 standard errors of 20 extrapolations.
    assert abs(np.mean([one.distance for one in found])) < 3 * np.std([one.distance for one in found]) / np.sqrt(20)
    # The line's own error is of the order of what 20 extrapolations differ by, and less: its draws share images.
    assert 0.1 < np.mean([one.error for one in found]) / np.std([one.distance for one in found]) < 1


def test_the_distance_at_infinity_tends_to_the_true_one():
    rng = np.random.default_rng(8)
    found = frechet_at_infinity(rng.normal(size=(500, 6)), rng.normal(1, 1, size=(800, 6)), rng)
    # The true one is 6; means of 500 images know it to a few per cent.
    assert found.distance == pytest.approx(6, rel=0.08)


def test_a_poor_fit_is_told_and_a_flat_line_is_none():
    rng = np.random.default_rng(9)
    other, values = rng.normal(size=(2, 60, 3))
    poor = frechet_at_infinity(np.concatenate([values, np.full((1, 3), 40.0)]), other, rng)
    assert poor.error > 0.05 * poor.distance
    # So far apart the distance hardly depends on n: R2 would be near 0, and nothing is unsure.
    flat = frechet_at_infinity(values + 10, other, rng)
    assert flat.error < 0.02 * flat.distance
