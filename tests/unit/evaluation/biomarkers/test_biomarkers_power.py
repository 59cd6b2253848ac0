"""Power by the formula against power by simulation, down to two subjects."""

import numpy as np
import pytest
from scipy.stats import t

from ccmdist.evaluation.biomarkers.equivalence import welch_tests
from ccmdist.evaluation.biomarkers.power import POWER, subjects_needed, tost_power

NUM_SIMULATIONS = 40_000


def accepted(sds, counts, margin, alpha, num, seed=0):
    """Which of ``num`` pairs of sets without a difference two one-sided Welch tests find equivalent."""
    rng = np.random.default_rng(seed)
    sets = [rng.normal(0, sd, (num, count)) for sd, count in zip(sds, counts, strict=True)]
    parts = [values.var(axis=1, ddof=1) / values.shape[1] for values in sets]
    error = np.sqrt(parts[0] + parts[1])
    freedom = error**4 / sum(part**2 / (values.shape[1] - 1) for part, values in zip(parts, sets, strict=True))
    differences = sets[0].mean(axis=1) - sets[1].mean(axis=1)
    return np.abs(differences) + t.ppf(1 - alpha, freedom) * error < margin, sets


@pytest.mark.parametrize(
    ("sds", "counts", "margin"),
    [
        ((1, 1), (2, 2), 6.0),
        ((1, 1), (3, 3), 2.0),
        ((1, 1), (3, 3), 4.0),
        ((1, 2), (4, 9), 2.5),
        ((0.5, 1), (20, 12), 0.8),
        ((1, 1), (40, 40), 0.6),
        ((1, 1), (106, 106), 0.3),
    ],
)
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_power_is_that_of_a_simulation(sds, counts, margin, alpha):
    is_accepted, _ = accepted(sds, counts, margin, alpha, NUM_SIMULATIONS)
    expected = is_accepted.mean()
    three_errors = 3 * np.sqrt(max(expected * (1 - expected), 1e-4) / NUM_SIMULATIONS)
    assert tost_power(sds, counts, margin, alpha) == pytest.approx(expected, abs=three_errors + 0.002)


def test_the_simulated_test_is_the_one_that_is_used():
    is_accepted, (first, second) = accepted((1, 2), (5, 8), 2.0, 0.05, 200, seed=1)
    assert is_accepted.any()
    assert not is_accepted.all()
    for expected, one, other in zip(is_accepted, first, second, strict=True):
        assert (welch_tests(one, other, 2.0)[0] < 0.05) == expected


def test_the_number_of_subjects_needed_is_the_smallest_with_that_power():
    # The normal approximation says 542, 241, 136 and 87.
    found = {margin: subjects_needed(1.0, margin, 0.05) for margin in (0.2, 0.3, 0.4, 0.5, 1, 2, 20)}
    assert found == {0.2: 542, 0.3: 242, 0.4: 136, 0.5: 88, 1: 23, 2: 7, 20: 2}
    for margin, num in found.items():
        assert tost_power((1, 1), (num, num), margin, 0.05) >= POWER
        assert num == 2 or tost_power((1, 1), (num - 1, num - 1), margin, 0.05) < POWER


def test_power_falls_with_spread_and_rises_with_margin_and_subjects():
    base = tost_power((1, 1), (20, 20), 0.8, 0.05)
    assert tost_power((1.5, 1), (20, 20), 0.8, 0.05) < base < tost_power((1, 1), (20, 20), 1.0, 0.05)
    assert base < tost_power((1, 1), (30, 20), 0.8, 0.05)
    assert tost_power((1, 1), (5, 5), 1e-6, 0.05) == 0
    assert tost_power((1e-9, 1e-9), (3, 3), 1.0, 0.05) == pytest.approx(1)
