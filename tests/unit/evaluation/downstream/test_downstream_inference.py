"""Tests between arms against slow and obvious ones; resamplings of subjects keep every group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.evaluation.downstream.inference import delong, mcnemar, resampled, resampled_p
from ccmdist.evaluation.downstream.summary import num_resamplings
from ccmdist.evaluation.statistics import holm, interval


def naive_delong(is_positive, first, second):
    """The paper's formulas, pair by pair."""
    areas, of_positives, of_negatives = [], [], []
    for scores in (first, second):
        x, y = scores[is_positive], scores[~is_positive]
        psi = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in y] for a in x])
        areas.append(psi.mean())
        of_positives.append([psi[i].mean() for i in range(len(x))])
        of_negatives.append([psi[:, j].mean() for j in range(len(y))])
    s = np.zeros((2, 2))
    for k in range(2):
        for m in range(2):
            for values, num in ((of_positives, len(x)), (of_negatives, len(y))):
                gaps = [(values[k][i] - areas[k]) * (values[m][i] - areas[m]) for i in range(num)]
                s[k, m] += sum(gaps) / (num - 1) / num
    variance = s[0, 0] + s[1, 1] - 2 * s[0, 1]
    return areas, 2 * norm.sf(abs(areas[0] - areas[1]) / variance**0.5) if variance > 1e-15 else 1.0


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(2, 9), st.sampled_from([3, 100]))
def test_delong_is_the_naive_test_with_and_without_equal_scores(seed, num_positive, num_negative, levels):
    rng = np.random.default_rng(seed)
    is_positive = rng.permutation(np.arange(num_positive + num_negative) < num_positive)
    first = rng.integers(0, levels, len(is_positive)) / levels
    second = np.round((first + rng.integers(0, levels, len(is_positive)) / levels) * levels) / levels
    areas, p = naive_delong(is_positive, first, second)
    found = delong(is_positive, first, second)
    assert (found.first, found.second) == pytest.approx(areas, abs=1e-12)
    if p > 1e-12 and np.isfinite(found.p):
        assert found.p == pytest.approx(p, abs=1e-8)


def test_delong_within_folds_has_its_level_where_networks_of_folds_are_not_equally_sure():
    rng = np.random.default_rng(4)
    is_positive, folds = np.tile([True, False], 30), np.repeat(np.arange(3), 20)
    rejected = np.zeros(2)
    for _ in range(300):
        common = 1.2 * is_positive + rng.normal(0, 1, 60)
        first, second = common + rng.normal(0, 1, (2, 60))
        shifted = second + np.array([0, 4, 8])[folds]
        rejected += [delong(is_positive, first, shifted, given).p < 0.05 for given in (folds, None)]
    assert rejected[0] / 300 < 0.08
    assert rejected[1] / 300 > 0.2  # what pooling them does


def test_areas_that_differ_without_any_variance_have_no_p():
    is_positive = np.array([True, True, False, False])
    found = delong(is_positive, np.array([0.9, 0.8, 0.2, 0.1]), np.full(4, 0.5))
    assert (found.first, found.second) == (1, 0.5)
    assert np.isnan(found.p)
    assert np.isnan(delong(is_positive, np.arange(4.0), np.ones(4), np.array([0, 1, 0, 1])).p)


@pytest.mark.parametrize("num_arms", [2, 9, 26, 80])
def test_resamplings_are_enough_for_a_difference_to_be_significant_among_all_arms(num_arms):
    config = EvaluateConfig(out="out", real="real", synthetic={"x": "x"}, num_bootstrap=1000)
    smallest = resampled_p(np.ones(num_resamplings(config, num_arms)))
    assert min(holm([smallest] * (num_arms - 1))) < config.alpha / 4


def test_delong_of_one_network_with_itself_finds_nothing_and_of_one_subject_says_nothing():
    is_positive, scores = np.array([True, True, False, False]), np.array([0.9, 0.3, 0.5, 0.1])
    assert delong(is_positive, scores, scores).p == 1
    assert np.isnan(delong(np.array([True, False, False]), scores[:3], scores[:3]).p)


@pytest.mark.parametrize(("alone_first", "alone_second"), [(0, 0), (5, 0), (7, 2), (1, 9)])
def test_mcnemar_is_the_binomial_test_of_those_whom_one_alone_recognised(alone_first, alone_second):
    first = np.array([True] * 6 + [True] * alone_first + [False] * alone_second + [False] * 3)
    second = np.array([True] * 6 + [False] * alone_first + [True] * alone_second + [False] * 3)
    total = alone_first + alone_second
    expected = binomtest(alone_first, total).pvalue if total else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def test_a_resampling_draws_as_many_of_each_group_as_there_are():
    groups = np.array([0] * 5 + [2] * 3 + [1])
    weights = resampled(groups, 200, np.random.default_rng(0))
    assert weights.shape == (201, 9)
    assert (weights[0] == 1).all()
    for group in range(3):
        assert (weights[:, groups == group].sum(1) == (groups == group).sum()).all()
    assert weights[1:, :5].std() > 0.5


def test_the_interval_of_a_mean_over_subjects_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        values = rng.normal(0, 1, 40)
        low, high = interval((resampled(np.zeros(40, int), 300, rng) @ values / 40)[1:], 0.9)
        covered += low <= 0 <= high
    assert 0.84 <= covered / 300 <= 0.95


def test_a_p_of_resamplings_is_two_sided_and_never_zero():
    assert resampled_p(np.ones(99)) == pytest.approx(2 / 100)
    assert resampled_p(np.concatenate([np.ones(5), -np.ones(94)])) == pytest.approx(12 / 100)
    assert resampled_p(np.zeros(99)) == 1
    assert resampled_p(np.array([np.nan] * 5 + [1.0] * 99)) == pytest.approx(2 / 100)


def test_undefined_resamplings_do_not_count():
    assert interval(np.array([np.nan, 1, 2, 3]), 1.0) == (1, 3)
    assert all(np.isnan(interval(np.array([np.nan]), 0.95)))
