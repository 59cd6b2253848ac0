"""Authenticity, C_T, membership and duplicates against the slow obvious way, and against what they are to detect."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from ccmdist.evaluation.memorisation.figures import (
    DUPLICATE_NCC,
    MIN_IN_CELL,
    area,
    authentic,
    copying_statistic,
    duplicate_rates,
    membership,
    rank_z,
)


def points(seed, num, offset=0.0):
    return np.random.default_rng(seed).normal(offset, 1, (num, 3))


def naive_authentic(synthetic, training):
    """Alaa et al.: an image is authentic if the training point that is nearest to it has a nearer training point."""
    answers = []
    for one in synthetic:
        to_training = [np.linalg.norm(one - other) for other in training]
        nearest = int(np.argmin(to_training))
        others = [np.linalg.norm(training[nearest] - other) for i, other in enumerate(training) if i != nearest]
        answers.append(to_training[nearest] > min(others))
    return np.array(answers)


def distances(first, second):
    return np.linalg.norm(first[:, None] - second, axis=2)


@pytest.mark.parametrize("seed", range(5))
def test_authenticity_is_that_of_the_definition(seed):
    training, synthetic = points(seed, 40), points(seed + 100, 30)
    between = distances(synthetic, training)
    own = distances(training, training) + np.diag(np.full(40, np.inf))
    found = authentic(between.min(axis=1), own.min(axis=1)[between.argmin(axis=1)])
    assert (found == naive_authentic(synthetic, training)).all()
    copies = training[:20] + 1e-3
    assert not naive_authentic(copies, training).any()


@settings(max_examples=40)
@given(
    first=st.lists(st.integers(0, 9), min_size=8, max_size=20),
    second=st.lists(st.integers(0, 9), min_size=8, max_size=20),
)
def test_the_rank_statistic_and_the_area_count_pairs(first, second):
    first, second = np.array(first, float), np.array(second, float)
    larger = sum((a > b) + 0.5 * (a == b) for a in first for b in second)
    spread = np.sqrt(len(first) * len(second) * (len(first) + len(second) + 1) / 12)
    assert rank_z(first, second) == pytest.approx((larger - len(first) * len(second) / 2) / spread)
    assert area(first, second) == pytest.approx(larger / (len(first) * len(second)))
    assert area(first, second) == pytest.approx(mannwhitneyu(first, second).statistic / (len(first) * len(second)))


def test_c_t_is_far_below_zero_for_copies_and_near_it_for_independent_points():
    training, held_out, independent = points(0, 200), points(1, 100), points(2, 100)
    copies = training[:100] + np.random.default_rng(3).normal(0, 0.05, (100, 3))

    def measured(synthetic):
        cells = [
            np.digitize(training[distances(one, training).argmin(axis=1)][:, 0], [0]) for one in (synthetic, held_out)
        ]
        near = [distances(one, training).min(axis=1) for one in (synthetic, held_out)]
        return copying_statistic(near[0], cells[0], near[1], cells[1])

    assert measured(copies) < -6
    assert abs(measured(independent)) < 3


def test_c_t_is_the_mean_of_its_cells_weighted_by_held_out_frames():
    rng = np.random.default_rng(5)
    synthetic, held_out = rng.normal(size=40), rng.normal(size=60)
    cells, held_out_cells = np.repeat([0, 1], 20), np.repeat([0, 1, 2], [15, 40, 5])
    expected = (15 * rank_z(synthetic[:20], held_out[:15]) + 40 * rank_z(synthetic[20:], held_out[15:55])) / 55
    assert copying_statistic(synthetic, cells, held_out, held_out_cells) == pytest.approx(expected)
    few = MIN_IN_CELL - 1
    assert copying_statistic(synthetic[:few], cells[:few], held_out[:few], held_out_cells[:few]) is None


def likeness(training, held_out, frames=2):
    rows = [
        {"subject": f"{kind}{subject}", "is_training": kind == "t", "likeness": value + 0.001 * number}
        for kind, values in (("t", training), ("h", held_out))
        for subject, value in enumerate(values)
        for number in range(frames)
    ]
    return pd.DataFrame(rows)


def test_membership_counts_subjects_and_knows_how_little_it_knows():
    rng = np.random.default_rng(6)
    same = membership(likeness(rng.normal(size=30), rng.normal(size=20)), 300, rng)
    assert (same.num_training_subjects, same.num_held_out_subjects) == (30, 20)
    assert same.interval[0] < 0.5 < same.interval[1]
    known = membership(likeness(rng.normal(2, 1, 30), rng.normal(size=20)), 300, rng)
    assert known.auc > 0.8
    assert known.interval[0] > 0.5
    # More frames of the same subjects are no more subjects.
    many = membership(likeness(rng.normal(size=30), rng.normal(size=20), frames=50), 300, rng)
    assert many.interval[1] - many.interval[0] > 0.2


def test_duplicates_are_counted_by_clinical_group():
    table = pd.DataFrame({"clinical_group": ["Control", "Control", "", "T1DPN"], "ncc": [0.9, 0.1, DUPLICATE_NCC, 0.2]})
    rates = {rate.clinical_group: (rate.num_duplicates, rate.num_images) for rate in duplicate_rates(table)}
    assert rates == {"Control": (1, 2), "T1DPN": (0, 1), "unlabelled": (1, 1)}
