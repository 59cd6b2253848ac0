"""Precision, recall, density and coverage against loops over balls, and on sets whose answer is known."""

import numpy as np
import pytest

from ccmdist.evaluation.fidelity.neighbours import DENSITY_NEIGHBOURS, MANIFOLD_NEIGHBOURS, neighbourhoods


def balls(values, k):
    """Centre and radius of each image's ball."""
    return [(one, sorted(np.linalg.norm(values - one, axis=1))[k]) for one in values]


def holds(ball, point):
    return np.linalg.norm(ball[0] - point) <= ball[1]


@pytest.mark.parametrize("shift", [0.0, 0.7, 2.0])
def test_all_four_are_what_loops_over_balls_give(shift):
    rng = np.random.default_rng(1)
    real, synthetic = rng.normal(size=(30, 4)), rng.normal(shift, 0.8, size=(25, 4))
    manifold, wide = balls(real, MANIFOLD_NEIGHBOURS), balls(real, DENSITY_NEIGHBOURS)
    of_synthetic = balls(synthetic, MANIFOLD_NEIGHBOURS)
    found = neighbourhoods(real, synthetic)
    assert found.precision == np.mean([any(holds(ball, one) for ball in manifold) for one in synthetic])
    assert found.recall == np.mean([any(holds(ball, one) for ball in of_synthetic) for one in real])
    inside = [sum(holds(ball, one) for ball in wide) for one in synthetic]
    assert found.density == pytest.approx(np.mean(inside) / DENSITY_NEIGHBOURS, rel=1e-12)
    assert found.coverage == np.mean([any(holds(ball, one) for one in synthetic) for ball in wide])


def test_equal_sets_are_covered_and_distant_ones_are_not():
    values = np.random.default_rng(2).normal(size=(40, 5))
    same = neighbourhoods(values, values)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = neighbourhoods(values, values + 50)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_set_that_has_lost_its_variety_keeps_its_precision_and_loses_recall_and_coverage():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(200, 3))
    found = neighbourhoods(real, real[0] + rng.normal(0, 0.02, (200, 3)))
    assert found.precision > 0.95
    assert found.recall < 0.1
    assert found.coverage < 0.3


def test_an_outlier_among_real_images_raises_precision_more_than_density():
    rng = np.random.default_rng(4)
    real = np.concatenate([rng.normal(size=(60, 2)), [[30.0, 30.0]]])
    between = rng.normal(12, 0.5, size=(40, 2))
    found = neighbourhoods(real, between)
    assert found.precision > 0.9
    assert found.density < 0.3
