"""Limits learnt from few held-out frames keep what they promise, whatever the distribution, and never open the gate."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ccmdist.evaluation.memorisation.chance import (
    HIGHEST_COPY_LIMIT,
    LOWEST_COPY_LIMIT,
    copy_limit,
    share_test,
)


def table(values, frames=1):
    values = np.asarray(values, float)
    return pd.DataFrame({"subject": [f"s{number // frames}" for number in range(len(values))], "ncc": values})


def test_sets_of_one_population_are_rarely_called_near_however_few_the_held_out_frames():
    rng, num = np.random.default_rng(0), 250
    for num_held_out, num_images, draw in ((20, 40, rng.normal), (36, 18, rng.exponential), (150, 300, rng.normal)):
        held_out = (table(draw(size=num_held_out)) for _ in range(num))
        p = np.array([share_test(one, table(draw(size=num_images)), 0.01).p for one in held_out])
        for alpha in (0.05, 0.01):
            # Three SD of the count above what the level allows.
            assert (p < alpha).mean() <= alpha + 3 * np.sqrt(alpha / num)


def test_the_p_of_exceedances_is_that_of_shuffled_labels():
    held_out, synthetic = np.array([0.1, 0.2, 0.3, 0.35, 0.5]), np.array([0.6, 0.7, 0.05, 0.8])
    found = share_test(table(held_out), table(synthetic), 0.01)
    assert (found.order, found.limit, found.num_near_images, found.num_near_subjects) == (1, 0.5, 3, 3.0)
    rng = np.random.default_rng(0)
    pooled = np.concatenate([held_out, synthetic])
    hits = 0
    for _ in range(20000):
        mixed = rng.permutation(pooled)
        hits += (mixed[5:] > mixed[:5].max()).sum() >= 3
    assert found.p == pytest.approx(hits / 20000, abs=0.006)


def test_frames_of_one_subject_that_are_all_alike_do_not_count_twice():
    rng = np.random.default_rng(1)
    alarms = []
    for _ in range(200):
        held_out, synthetic = (np.repeat(rng.normal(size=size), 8) for size in (25, 12))
        alarms.append(share_test(table(held_out, 8), table(synthetic, 8), 0.01).p < 0.01)
    assert np.mean(alarms) <= 0.01 + 3 * np.sqrt(0.01 / 200)


def test_a_set_that_lies_nearer_as_a_whole_is_found():
    rng = np.random.default_rng(2)
    found = share_test(table(rng.normal(0.2, 0.05, 40)), table(rng.normal(0.35, 0.05, 40)), 0.01)
    assert found.p < 1e-3
    assert found.num_near_images > 15


def test_counts_that_could_never_tell_say_so():
    assert share_test(table([0.1] * 10), table([0.2] * 2), 0.01).lowest_p > 0.001
    assert share_test(table([0.1] * 40), table([0.2] * 40), 0.01).lowest_p < 0.001


def test_with_many_held_out_subjects_the_limit_is_the_stated_quantile():
    found = share_test(table(np.arange(999)), table([0.0]), 0.01)
    assert (found.order, found.limit, found.expected_share) == (10, 989, 0.01)


@settings(max_examples=60)
@given(
    values=st.lists(st.floats(-1, 1), min_size=1, max_size=40),
    num_images=st.integers(1, 10**6),
    alpha=st.floats(1e-6, 0.1),
)
def test_the_copy_limit_stays_within_its_bounds_whatever_the_held_out_frames_are(values, num_images, alpha):
    assert LOWEST_COPY_LIMIT <= copy_limit(table(values), num_images, alpha) <= HIGHEST_COPY_LIMIT


def test_the_copy_limit_rises_with_the_spread_and_with_the_number_of_images():
    quantiles = norm.ppf(np.linspace(0.002, 0.998, 200))
    wide, narrow = table(np.tanh(0.25 + 0.074 * quantiles)), table(np.tanh(0.15 + 0.03 * quantiles))
    assert copy_limit(narrow, 100, 0.001) == LOWEST_COPY_LIMIT
    assert LOWEST_COPY_LIMIT < copy_limit(wide, 100, 0.001) < copy_limit(wide, 100_000, 0.001) < HIGHEST_COPY_LIMIT


def test_no_independent_image_of_a_normal_population_is_called_a_copy_more_often_than_promised():
    rng = np.random.default_rng(4)
    exceeded = 0
    for _ in range(1000):
        draws = np.tanh(rng.normal(0.3, 0.07, 36 + 72))
        exceeded += draws[36:].max() > copy_limit(table(draws[:36]), 72, 0.05)
    assert exceeded / 1000 < 0.05 + 3 * np.sqrt(0.05 / 1000)
