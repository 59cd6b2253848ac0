"""Agreement of paired values, against other ways to take it."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm

from ccmdist.evaluation.biomarkers.agreement import absolute_agreement, limits_of_agreement


def by_analysis_of_variance(first, second):
    """ICC(2,1) from the mean squares that statsmodels finds."""
    num = len(first)
    table = pd.DataFrame(
        {
            "value": np.concatenate([first, second]),
            "image": np.tile(np.arange(num), 2),
            "judge": np.repeat(["first", "second"], num),
        }
    )
    found = anova_lm(ols("value ~ C(image) + C(judge)", data=table).fit())
    squares = found["sum_sq"] / found["df"]
    images, judges, rest = squares["C(image)"], squares["C(judge)"], squares["Residual"]
    return (images - rest) / (images + rest + 2 * (judges - rest) / num)


@pytest.mark.parametrize(("num", "noise", "bias"), [(3, 0.5, 0.0), (12, 1.0, 0.7), (40, 0.1, -2.0), (40, 5.0, 0.0)])
def test_agreement_is_that_of_an_analysis_of_variance(num, noise, bias):
    rng = np.random.default_rng(num)
    first = rng.normal(10, 2, num)
    second = first + bias + rng.normal(0, noise, num)
    assert absolute_agreement(first, second) == pytest.approx(by_analysis_of_variance(first, second), abs=1e-9)


def test_agreement_is_that_of_the_mean_squares():
    # Judges 1 and 2 of the example of Shrout and Fleiss 1979.
    first, second = np.array([9.0, 6, 8, 7, 10, 6]), np.array([2.0, 1, 4, 1, 5, 2])
    values = np.stack([first, second], axis=1)
    grand = values.mean()
    rows = 2 * ((values.mean(axis=1) - grand) ** 2).sum() / 5
    columns = 6 * ((values.mean(axis=0) - grand) ** 2).sum() / 1
    error = ((values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + grand) ** 2).sum() / 5
    by_hand = (rows - error) / (rows + error + 2 * (columns - error) / 6)
    assert absolute_agreement(first, second) == pytest.approx(by_hand)


def test_agreement_is_one_for_equal_values_and_falls_with_a_bias():
    values = np.arange(10.0)
    assert absolute_agreement(values, values) == pytest.approx(1)
    assert absolute_agreement(values, values + 5) < 0.5
    assert np.isnan(absolute_agreement(values[:2], values[:2]))
    assert absolute_agreement(np.append(values, np.nan), np.append(values, 3.0)) == pytest.approx(1)


def test_limits_of_agreement_by_hand():
    first, second = np.array([11.0, 12.0, 9.0, 14.0]), np.array([10.0, 13.0, 8.0, 11.0])
    found = limits_of_agreement(first, second, 4)
    # Differences 1, -1, 1, 3: mean 1, variance 8 / 3.
    spread = np.sqrt(8 / 3)
    assert (found.num_pairs, found.num_subjects, found.bias) == (4, 4, 1)
    assert [found.lower, found.upper] == pytest.approx([1 - 1.96 * spread, 1 + 1.96 * spread], rel=1e-12)
    quantile = t.ppf(0.975, 3)
    assert found.bias_interval == pytest.approx((1 - quantile * spread / 2, 1 + quantile * spread / 2), rel=1e-12)
    error = spread * np.sqrt(1 / 4 + 1.96**2 / 6)
    assert found.upper_interval == pytest.approx((found.upper - quantile * error, found.upper + quantile * error))
    assert found.lower_interval == pytest.approx((found.lower - quantile * error, found.lower + quantile * error))


def test_intervals_of_the_bias_and_the_limits_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = np.zeros(3)
    for _ in range(2000):
        found = limits_of_agreement(rng.normal(0.5, 2.0, 20), np.zeros(20), 20)
        truths = (0.5, 0.5 - 1.96 * 2, 0.5 + 1.96 * 2)
        intervals = (found.bias_interval, found.lower_interval, found.upper_interval)
        covered += [low <= truth <= high for truth, (low, high) in zip(truths, intervals, strict=True)]
    assert covered[0] / 2000 == pytest.approx(0.95, abs=0.02)
    assert covered[1:] / 2000 == pytest.approx([0.95, 0.95], abs=0.03)


def test_frames_that_repeat_their_subject_do_not_narrow_the_intervals():
    rng = np.random.default_rng(2)
    one = rng.normal(0, 1, 15)
    ten = np.repeat(one, 10)
    widths = [np.ptp(limits_of_agreement(values, np.zeros_like(values), 15).bias_interval) for values in (one, ten)]
    assert widths[1] == pytest.approx(widths[0], rel=0.05)


@given(st.integers(0, 1000), st.floats(-5, 5), st.floats(0.1, 10))
def test_limits_move_with_a_bias_and_scale_with_the_unit(seed, shift, scale):
    first, second = np.random.default_rng(seed).normal(size=(2, 9))
    base, moved = limits_of_agreement(first, second, 9), limits_of_agreement((first + shift) * scale, second * scale, 9)
    assert moved.bias == pytest.approx((base.bias + shift) * scale, abs=1e-9)
    assert moved.upper - moved.lower == pytest.approx((base.upper - base.lower) * scale)
