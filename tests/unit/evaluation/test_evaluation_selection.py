"""What makes one checkpoint better than another."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.weightstats import DescrStatsW

from ccmdist.config.select import Metric
from ccmdist.evaluation.selection import DEFINITIONS, best_step, equivalence_margin

VALUES = st.dictionaries(
    st.integers(1, 10**8 - 1), st.floats() | st.sampled_from([0.0, -0.5, 0.5, math.nan]), max_size=8
)


@given(values=VALUES, metric=st.sampled_from(sorted(DEFINITIONS)))
def test_no_finite_value_is_better_than_the_chosen_one_and_no_earlier_one_is_as_good(values, metric):
    finite = {step: value for step, value in values.items() if math.isfinite(value)}
    chosen = best_step(values, metric)
    if not finite:
        assert chosen is None
        return
    is_better = {
        "cnfl_agreement": lambda a, b: a > b,
        "cldice": lambda a, b: a > b,
        "cnfl_bias": lambda a, b: abs(a) < abs(b),
        "cnfl_equivalence": lambda a, b: a < b,
    }[metric]
    assert not any(is_better(value, finite[chosen]) for value in finite.values())
    assert all(is_better(finite[chosen], value) for step, value in finite.items() if step < chosen)


def test_every_metric_is_defined():
    assert set(DEFINITIONS) == set(Metric.__args__)


def tables(num_subjects, shift, seed):
    """Real and drawn images, one to three of each subject."""
    random = np.random.default_rng(seed)
    subjects = [f"s{index}" for index in range(num_subjects) for _ in range(1 + index % 3)]
    real = pd.DataFrame({"subject": subjects, "x": random.normal(20, 4, len(subjects))})
    return real, real.assign(x=real["x"] + shift + random.normal(0, 1, len(subjects)))


@pytest.mark.parametrize(("num_subjects", "shift", "alpha"), [(3, 0.5, 0.05), (8, -2.0, 0.05), (40, 0.0, 0.01)])
def test_at_the_margin_two_one_sided_tests_are_just_significant(num_subjects, shift, alpha):
    """Against statsmodels, to 1e-9 of alpha."""
    real, drawn = tables(num_subjects, shift, 1)
    means = [table.groupby("subject")["x"].mean() for table in (real, drawn)]
    margin = equivalence_margin(real, drawn, "x", alpha) * means[0].mean()
    p, *_ = DescrStatsW((means[1] - means[0]).to_numpy()).ttost_mean(-margin, margin)
    assert p == pytest.approx(alpha, abs=1e-9)


def test_a_margin_needs_two_subjects_that_are_in_both():
    real, drawn = tables(4, 0.0, 2)
    assert math.isnan(equivalence_margin(real, drawn[drawn["subject"] == "s0"], "x", 0.05))
    missing = drawn.assign(x=drawn["x"].where(drawn["subject"].isin(["s0", "s1"])))
    assert equivalence_margin(real, missing, "x", 0.05) > 0
    assert math.isnan(equivalence_margin(real.assign(x=0.0), drawn, "x", 0.05))
