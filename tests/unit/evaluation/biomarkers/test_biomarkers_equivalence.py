"""Equivalence and difference on sets whose answer is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t, ttest_ind
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from ccmdist.evaluation.biomarkers.equivalence import (
    bootstrap_interval,
    equivalence_of_set,
    holm,
    paired_interval,
    paired_tost,
    subject_means,
    welch_tests,
)
from ccmdist.evaluation.biomarkers.power import subjects_needed, tost_power

MARGINS = {"cnfl": 0.06}


def table(num_subjects, seed, mean=15.0, sd=0.6, frames=2, group="Control", prefix="s"):
    rng = np.random.default_rng(seed)
    subjects = [f"{prefix}{index:03d}" for index in range(num_subjects)]
    values = np.repeat(rng.normal(mean, sd, num_subjects), frames) + rng.normal(0, 0.3, num_subjects * frames)
    return pd.DataFrame({"subject": np.repeat(subjects, frames), "clinical_group": group, "found_cnfl": values})


def rows_of(real, synthetic, min_subjects=3):
    rng = np.random.default_rng(0)
    return equivalence_of_set(real, synthetic, "found_", MARGINS, 0.05, min_subjects, 300, rng)


def test_a_set_compared_with_itself_is_equivalent_with_enough_subjects():
    real = table(40, seed=0)
    rows, left_out = rows_of(real, real)
    assert [row.clinical_group for row in rows] == ["all", "Control"]
    assert {row.verdict for row in rows} == {"equivalent"}
    assert all(row.difference == 0 and row.equivalent_when_paired and row.paired_tost_p == 0 for row in rows)
    assert left_out == []


def test_with_few_subjects_the_same_set_is_inconclusive_and_not_equivalent():
    real = table(4, seed=1, sd=3)
    rows, _ = rows_of(real, real.assign(subject="x" + real["subject"]))
    assert {row.verdict for row in rows} == {"inconclusive"}
    assert rows[0].subjects_needed > 50
    assert rows[0].paired_tost_p is None
    assert rows[0].paired_interval is None


def test_a_shifted_set_is_different_and_not_equivalent():
    real = table(40, seed=2)
    rows, _ = rows_of(real, table(40, seed=3, mean=17.5, prefix="t"))
    assert {row.verdict for row in rows} == {"different"}
    assert all(row.tost_p_holm > 0.99 and row.difference_p_holm < 1e-6 for row in rows)
    assert rows[0].difference == pytest.approx(2.5, abs=0.4)
    assert rows[0].interval[0] > rows[0].margin


def test_a_small_certain_difference_is_equivalent_and_yet_different():
    rows, _ = rows_of(table(400, seed=4), table(400, seed=5, mean=15.4, prefix="t"))
    assert rows[0].verdict == "equivalent, but different"


@given(st.integers(0, 1000), st.floats(0.05, 3), st.integers(2, 30), st.integers(2, 30))
def test_both_tests_are_those_of_statsmodels_comparison_of_means(seed, margin, num_synthetic, num_real):
    """CompareMeans takes moments and Satterthwaite's degrees of freedom by itself."""
    rng = np.random.default_rng(seed)
    synthetic, real = rng.normal(0.2, 2, num_synthetic), rng.normal(0, 1, num_real)
    means = CompareMeans(DescrStatsW(synthetic), DescrStatsW(real))
    freedom = means.dof_satt()
    error, difference = means.std_meandiff_separatevar, synthetic.mean() - real.mean()
    expected = max(t.sf((difference + margin) / error, freedom), t.cdf((difference - margin) / error, freedom))
    tost_p, difference_p = welch_tests(synthetic, real, margin)
    assert tost_p == pytest.approx(expected, abs=1e-10)
    assert difference_p == pytest.approx(means.ttest_ind(usevar="unequal")[1], abs=1e-10)


def test_the_tests_are_those_of_the_formula():
    synthetic, real = np.array([1.0, 2.0, 4.0, 5.5]), np.array([2.0, 2.5, 3.5, 6.0, 4.0])
    variances = synthetic.var(ddof=1) / 4, real.var(ddof=1) / 5
    error = np.sqrt(sum(variances))
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 4)
    difference = synthetic.mean() - real.mean()
    by_hand = max(t.sf((difference + 2) / error, freedom), t.cdf((difference - 2) / error, freedom))
    tost_p, difference_p = welch_tests(synthetic, real, 2.0)
    assert tost_p == pytest.approx(by_hand)
    assert difference_p == pytest.approx(ttest_ind(synthetic, real, equal_var=False).pvalue)


@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_equivalence_is_symmetric(seed, margin):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=8), rng.normal(size=6)
    assert welch_tests(first, second, margin) == pytest.approx(welch_tests(second, first, margin))


def test_pairs_find_what_independent_sets_cannot():
    real = table(10, seed=6, sd=3)
    rows, _ = rows_of(real, real.assign(found_cnfl=real["found_cnfl"] * 1.01))
    assert rows[0].verdict == "inconclusive"
    assert rows[0].equivalent_when_paired
    assert np.ptp(rows[0].paired_interval) < np.ptp(rows[0].interval) / 5


def test_pairs_without_any_spread_are_decided_by_their_difference():
    assert paired_tost(np.zeros(5), 1.0) == 0
    assert paired_tost(np.full(5, 2.0), 1.0) == 1


def test_holm_by_hand():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_a_subject_counts_once_however_many_frames_it_has():
    frames = pd.DataFrame({"subject": ["a"] * 9 + ["b"], "clinical_group": "", "found_cnfl": [1.0] * 9 + [3.0]})
    assert subject_means(frames, "found_cnfl").mean() == 2


@pytest.mark.parametrize("num_subjects", [6, 12, 25])
def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say_with_few_subjects_too(num_subjects):
    rng = np.random.default_rng(7)
    covered = np.zeros(2)
    for _ in range(400):
        first, second = rng.normal(1, 1, num_subjects), rng.normal(0, 1, num_subjects)
        found = bootstrap_interval(first, second, 0.9, 300, rng), paired_interval(first, 0.9, 300, rng)
        covered += [low <= 1 <= high for low, high in found]
    # 400 samples know it to 1.5 %; plain percentiles cover 0.80 to 0.83 with six subjects.
    assert (covered / 400 > 0.86).all()
    assert (covered / 400 < 0.95).all()


def test_the_interval_of_few_subjects_lies_within_the_margin_where_the_test_finds_equivalence():
    rng = np.random.default_rng(8)
    agree = []
    for _ in range(200):
        first, second = rng.normal(0, 1, 6), rng.normal(0, 1.5, 6)
        low, high = bootstrap_interval(first, second, 0.9, 2000, rng)
        agree.append((max(abs(low), abs(high)) < 1.6) == (welch_tests(first, second, 1.6)[0] < 0.05))
    assert np.mean(agree) > 0.93


def test_the_bootstrap_resamples_subjects_and_not_frames():
    """Frames that repeat their subject's value add nothing: the interval is as wide as with one frame each."""
    one, ten = (table(12, seed=8, frames=frames).assign(clinical_group="") for frames in (1, 10))
    values = dict(zip(one["subject"], one["found_cnfl"], strict=True))
    ten = ten.assign(found_cnfl=ten["subject"].map(values))
    other = table(12, seed=9, prefix="t").assign(clinical_group="")
    widths = [np.ptp(rows_of(real, other)[0][0].interval) for real in (one, ten)]
    assert widths[0] == pytest.approx(widths[1])


def test_a_shift_of_ten_per_cent_fails_at_a_number_that_finds_identical_sets_equivalent():
    real, again, shifted = (
        table(60, seed=20),
        table(60, seed=21, prefix="t"),
        table(60, seed=21, mean=15.0 * 1.1, prefix="t"),
    )
    same, other = rows_of(real, again)[0], rows_of(real, shifted)[0]
    assert {row.verdict for row in same} == {"equivalent"}
    assert same[0].power > 0.99
    assert {row.verdict for row in other} == {"different"}
    assert all(row.tost_p_holm > 0.9 for row in other)


def test_the_power_of_a_row_is_of_its_subjects_and_margin():
    row = rows_of(table(12, seed=22), table(9, seed=23, prefix="t"))[0][0]
    second = subject_means(table(9, seed=23, prefix="t"), "found_cnfl").std()
    assert row.power == tost_power((row.real_sd, second), (12, 9), row.margin, 0.05)
    assert row.subjects_needed == subjects_needed(np.sqrt((row.real_sd**2 + second**2) / 2), row.margin, 0.05)


def test_unlabelled_subjects_count_over_all_and_are_told():
    real = pd.concat([table(6, seed=10), table(5, seed=11, group="", prefix="u")], ignore_index=True)
    rows, left_out = rows_of(real, real)
    assert {row.clinical_group: row.num_real_subjects for row in rows} == {"all": 11, "Control": 6}
    assert left_out[0].what == "equivalence per clinical group"
    assert left_out[0].reason == "5 of 11 real subjects are unlabelled; they count in the rows of all subjects only"


@pytest.mark.parametrize(
    ("real", "reason"),
    [
        (table(1, seed=12), "1 real and 1 synthetic subjects have a value, at least 3 each are needed"),
        (table(2, seed=12), "2 real and 2 synthetic subjects have a value, at least 3 each are needed"),
        (table(5, seed=12).assign(found_cnfl=0.0), "the real mean is zero"),
        (table(5, seed=12).assign(found_cnfl=3.0), "the subjects do not differ at all within either set"),
        (table(5, seed=12).assign(found_cnfl=np.nan), "0 real and 0 synthetic subjects have a value"),
    ],
)
def test_what_cannot_be_tested_is_left_out_with_the_reason(real, reason):
    rows, left_out = rows_of(real, real)
    assert rows == []
    assert left_out[0].what == "CNFL, all subjects"
    assert left_out[0].reason.startswith(reason)


def test_a_group_that_one_set_lacks_is_left_out_with_the_counts():
    real = pd.concat([table(6, seed=30), table(6, seed=31, group="T1DPN", prefix="d")], ignore_index=True)
    rows, left_out = rows_of(real, table(6, seed=32, prefix="t"))
    assert [row.clinical_group for row in rows] == ["all", "Control"]
    assert [(one.what, one.reason) for one in left_out] == [
        ("CNFL, T1DPN", "6 real and 0 synthetic subjects have a value, at least 3 each are needed")
    ]
