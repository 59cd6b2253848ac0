"""What a run's time was spent on, what failures cost and how often to commit, on ledgers whose answers are known."""

import pytest

from ccmdist.diagnostics.goodput import advise, attempts_of, goodput, pace
from tests.unit.diagnostics.made_ledgers import Ledger, killed, preempted, refused, straight


def test_a_straight_run_spends_its_time_on_starting_computing_and_saving():
    figures = goodput(straight().lines, is_alive=False)
    spent = {name: seconds for name, seconds in figures.buckets_s.items() if seconds}
    assert spent == {"startup": 10.0, "restore": 5.0, "compute": 40.0, "checkpoint": 2.0}
    assert figures.wall_s == 57.0
    assert figures.share == figures.share_without_queue == pytest.approx(40 / 57)
    assert (figures.num_failures, figures.num_stops, figures.lost_steps) == (0, 0, 0)
    assert figures.mean_s_between_failures is None
    assert figures.recovery_s is None


def test_a_clean_stop_loses_no_step_and_is_no_failure():
    figures = goodput(preempted().lines, is_alive=False)
    assert (figures.num_failures, figures.num_stops, figures.lost_steps) == (0, 1, 0)
    assert figures.buckets_s["queue"] == 30.0
    assert figures.buckets_s["wasted"] == 0.0
    assert figures.share == pytest.approx(40 / 102)
    assert figures.share_without_queue == pytest.approx(40 / 72)
    assert figures.gpu_hours == pytest.approx(4 * 72 / 3600)
    assert figures.recovery_s == 30.0 + 15.0 + 28.0  # queue, start, and the 14 steps of the first line that is new


def test_steps_that_a_kill_undid_are_wasted_and_counted():
    figures = goodput(killed().lines, is_alive=True)
    assert (figures.num_failures, figures.num_stops, figures.lost_steps) == (1, 0, 4)
    assert figures.lost_steps_per_failure == 4.0
    assert figures.buckets_s["wasted"] == 8.0
    assert figures.buckets_s["compute"] == 36.0
    assert figures.mean_s_between_failures == 44.0 + 31.0
    assert figures.recovery_s == 30.0 + 15.0 + 8.0 + 8.0  # the lost steps too have to be done again first


def test_the_last_attempt_counts_as_a_failure_once_it_is_dead_and_its_open_steps_as_wasted():
    figures = goodput(killed().lines, is_alive=False)
    assert figures.num_failures == 2
    assert figures.lost_steps == 4 + 8
    assert figures.buckets_s["wasted"] == 8.0 + 16.0
    assert figures.wall_s == goodput(killed().lines, is_alive=True).wall_s
    assert [attempt.state for attempt in attempts_of(killed().lines, is_alive=False)] == ["killed", "killed"]


def test_a_refusal_tells_its_reason_and_what_it_lost_but_is_no_failure():
    (attempt,) = attempts_of(refused().lines, is_alive=False)
    assert (attempt.state, attempt.last_step, attempt.lost_steps) == ("refused", 12, 2)
    assert "not finite" in attempt.reason
    assert goodput(refused().lines, is_alive=False).num_failures == 0


def test_an_attempt_begins_where_its_restore_found_a_whole_checkpoint():
    ledger = Ledger().attempt(0).steps(0, 20).commit(10).commit(20).attempt(20)
    for line in ledger.lines[-2:]:
        line |= {"step": 10, "last_step": 10}  # the newest checkpoint was broken
    attempts = attempts_of(ledger.lines, is_alive=True)
    assert (attempts[1].first_step, attempts[0].lost_steps) == (10, 10)


def test_buckets_sum_to_the_wall_time():
    for ledger in (straight(), preempted(), killed(), refused()):
        for is_alive in (True, False):
            figures = goodput(ledger.lines, is_alive)
            wall_s = ledger.lines[-1]["time"] - ledger.lines[0]["began"]
            assert sum(figures.buckets_s.values()) == pytest.approx(wall_s)


def test_before_the_first_attempt_there_are_no_figures():
    assert goodput([], is_alive=False) is None
    assert pace([]) is None
    assert goodput(Ledger().attempt(0).lines, is_alive=True).advice is None


def test_the_pace_is_that_of_the_present_attempt_with_saves_and_waits():
    ledger = Ledger().attempt(0).steps(0, 10, step_s=9.0).attempt(10)
    ledger.steps(10, 20, step_s=2.0, wait_s=0.5).commit(20, seconds=5.0)
    assert pace(ledger.lines) == pytest.approx(2.0 + 0.5 + 0.5)
    assert pace(ledger.lines, ("compute",)) == 2.0


@pytest.mark.parametrize(
    ("save_s", "failure_every_s", "interval_s"), [(60, 4 * 3600, 1275), (30, 8 * 3600, 1295), (5, 1800, 131)]
)
def test_advice_agrees_with_published_intervals(save_s, failure_every_s, interval_s):
    # Tolerance: the reference values are rounded to seconds.
    advice = advise(save_s, failure_every_s, step_s=10.0)
    assert advice.interval_s == pytest.approx(interval_s, abs=0.5)
    assert advice.interval_steps == round(advice.interval_s / 10)
    assert not advice.is_assumed


def test_without_a_failure_the_advice_says_that_it_assumes_one_per_eight_hours():
    figures = goodput(straight().lines, is_alive=False)
    assert figures.advice.is_assumed
    assert figures.advice.failure_every_s == 8 * 3600
    # sqrt(2 x 1 s x 28800 s) = 240 s, less the save itself and a little more by the higher terms; steps of 2 s.
    assert figures.advice.interval_s == pytest.approx(239.3, abs=0.1)
    assert figures.advice.interval_steps == 120


def test_steps_longer_than_the_interval_are_saved_one_by_one():
    assert advise(1.0, 75.0, step_s=1000.0).interval_steps == 1
