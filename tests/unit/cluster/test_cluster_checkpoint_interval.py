"""The advised interval is the one at which a simulated run gets the most done."""

import random

import pytest

from ccmdist.cluster.checkpoint_interval import daly_interval_s, young_interval_s

CASES = [
    # save, failure every, restart, Young, Daly, share of time in surviving work by an independent simulation
    (60, 4 * 3600, 300, 1315, 1275, 0.8946),
    (30, 8 * 3600, 180, 1315, 1295, 0.9491),
    (5, 30 * 60, 60, 134, 131, 0.8974),
]


def simulated_share(interval_s, save_s, failure_every_s, restart_s, num_failures=4000, seed=0):
    """Share of time that survives when failures come at random, at any moment, and a restart takes ``restart_s``."""
    source, useful, total = random.Random(seed), 0.0, 0.0
    for _ in range(num_failures):
        alive = source.expovariate(1 / failure_every_s)
        saved = max(alive - restart_s, 0.0) // (interval_s + save_s)
        useful += saved * interval_s
        total += alive
    return useful / total


@pytest.mark.parametrize(("save_s", "failure_every_s", "restart_s", "young", "daly", "share"), CASES)
def test_the_advised_interval_is_that_of_the_papers(save_s, failure_every_s, restart_s, young, daly, share):
    assert young_interval_s(save_s, failure_every_s) == pytest.approx(young, abs=1)
    assert daly_interval_s(save_s, failure_every_s) == pytest.approx(daly, abs=1)


@pytest.mark.parametrize(("save_s", "failure_every_s", "restart_s", "young", "daly", "share"), CASES)
def test_no_interval_does_better_in_a_simulation(save_s, failure_every_s, restart_s, young, daly, share):
    def simulated(interval_s):
        return simulated_share(interval_s, save_s, failure_every_s, restart_s)

    advised = simulated(daly_interval_s(save_s, failure_every_s))
    assert advised == pytest.approx(share, abs=0.02)
    assert advised > simulated(daly / 4) + 0.02
    assert advised > simulated(4 * daly) + 0.02
    assert advised > simulated(daly / 2) - 0.002
    assert advised > simulated(2 * daly) - 0.002


def test_saves_longer_than_the_time_between_failures_are_made_once_per_failure():
    assert daly_interval_s(100, 50) == 50
