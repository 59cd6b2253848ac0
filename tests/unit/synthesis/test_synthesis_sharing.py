"""Workers of one set help each other: whoever lives draws what is left, and no two draw one batch."""

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from files_of_sets import contents
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccmdist.data.manifest import MANIFEST
from ccmdist.errors import Preempted
from ccmdist.synthesis import generate
from ccmdist.synthesis.claims import claimed, order_of_help, share
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.output import BATCHES, CLAIMS, SyntheticSet
from ccmdist.synthesis.plan import read_plan

NUM_BATCHES = 5


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.fixture
def draws(config, plan_of, remembered, monkeypatch):
    """The numbers of the batches in the order in which they are drawn; the fixture's ``before`` is called with each."""
    batch_of = {
        request.key: number for number, batch in enumerate(plan_of(config()).batches) for request in batch.requests
    }

    class Draws(list):
        before = staticmethod(lambda batch: None)

    drawn_batches = Draws()

    def draw(self, requests, original=remembered.draw):
        batch = batch_of[requests[0].key]
        drawn_batches.append(batch)
        drawn_batches.before(batch)
        return original(self, requests)

    monkeypatch.setattr(remembered, "draw", draw)
    return drawn_batches


def begun(config):
    """The set of a config that a stopped worker has begun with nothing but its plan."""
    with pytest.raises(Preempted, match="stopped with 0 of 5 batches drawn and committed"):
        synthesize(config, None, should_stop=lambda: True)
    return SyntheticSet(config.out, read_plan(config.out))


@given(num_batches=st.integers(0, 60), num_workers=st.integers(1, 9), data=st.data())
def test_help_reaches_every_batch_from_the_far_end_of_another_share(num_batches, num_workers, data):
    worker = data.draw(st.integers(0, num_workers - 1))
    order = list(order_of_help(num_batches, worker, num_workers))
    assert sorted(order) == list(range(num_batches))
    if num_batches >= num_workers > 1:
        assert order[0] == share(num_batches, (worker + 1) % num_workers, num_workers)[-1]
        firsts = {next(order_of_help(num_batches, other, num_workers)) for other in range(num_workers)}
        assert len(firsts) == num_workers


def test_a_worker_draws_its_own_share_and_then_those_of_workers_that_never_came(config, drawn, draws, tmp_path):
    assert synthesize(config(), None, 1, 3)
    assert draws == [1, 4, 2, 3, 0]
    assert contents(tmp_path / "out") == contents(drawn)


def test_a_batch_that_another_worker_draws_is_left_to_it(config, drawn, draws, tmp_path):
    output = begun(config())
    with output.claim(3) as is_mine:
        assert is_mine
        assert not synthesize(config(), None, 0, 2)
        assert draws == [0, 2, 4, 1]
        assert sorted(path.name for path in (tmp_path / "out" / BATCHES).iterdir()) == ["test-000002.tar"]
        assert not (tmp_path / "out" / MANIFEST).exists()
    # It died: the worker that is started in its place finds the batch.
    assert synthesize(config(), None, 1, 2)
    assert draws == [0, 2, 4, 1, 3]
    assert contents(tmp_path / "out") == contents(drawn)


def test_where_others_draw_all_that_is_left_no_model_is_loaded(config, draws, monkeypatch):
    output = begun(config())
    assert not any(map(output.is_committed, range(NUM_BATCHES)))

    def refuse(*_):
        raise AssertionError("the model was loaded")

    claims = [claimed(output.folder / CLAIMS, batch) for batch in range(NUM_BATCHES)]
    assert [claim.__enter__() for claim in claims] == [True] * NUM_BATCHES
    with monkeypatch.context() as patch:
        patch.setattr(generate, "ImageSampler", refuse)
        assert not synthesize(config(), None)
    for claim in claims:
        claim.__exit__(None, None, None)
    assert synthesize(config(), None)


def test_a_batch_that_was_committed_between_two_looks_is_not_drawn_again(config, draws, monkeypatch):
    output = begun(config())
    looks = iter([False, True])
    monkeypatch.setattr(output, "is_committed", lambda batch: next(looks))
    assert not output.is_free(0)


def test_a_batch_that_dies_with_its_helper_is_found_in_a_second_round(config, drawn, draws, tmp_path):
    output = begun(config())
    claim = output.claim(4)
    assert claim.__enter__()
    # The holder of batch 4 dies while batch 0, the last one of the first round, is drawn.
    draws.before = lambda batch: claim.__exit__(None, None, None) if batch == 0 else None
    assert synthesize(config(), None, 1, 2)
    assert draws == [1, 3, 2, 0, 4]
    assert contents(tmp_path / "out") == contents(drawn)


EVENTS = st.lists(
    st.tuples(st.sampled_from(["nothing", "worker starts", "is killed", "is stopped"]), st.integers(0, 3)), max_size=14
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS)
def test_whatever_workers_start_and_die_meanwhile_every_batch_is_drawn_and_no_living_one_twice(
    events, config, drawn, draws, tmp_path
):
    """While a batch is drawn, other workers start, run to their end, are stopped, or are killed at any batch."""
    changed = config(out=f"set-{len(list(tmp_path.iterdir()))}")
    coming, num_lost = iter(events), Counter()
    draws.clear()
    stops = []

    def before(batch):
        event, worker = next(coming, ("nothing", 0))
        if event == "worker starts":
            work(worker)
        elif event == "is killed":
            num_lost[batch] += 1
            raise Killed
        elif event == "is stopped":
            stops.append(True)

    def work(worker):
        with contextlib.suppress(Killed, Preempted):
            synthesize(changed, None, worker, 4, should_stop=lambda: bool(stops and stops.pop()))

    draws.before = before
    work(0)
    draws.before = lambda batch: None
    stops.clear()
    assert synthesize(changed, None, 3, 4)
    assert Counter(draws) == Counter(range(NUM_BATCHES)) + num_lost
    assert contents(changed.out) == contents(drawn)


HOLD = """
import sys, time
from pathlib import Path
from ccmdist.synthesis.claims import claimed
with claimed(Path(sys.argv[1]), 3) as is_mine:
    print(is_mine, flush=True)
    time.sleep(600)
"""


def test_a_claim_dies_with_its_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        with claimed(tmp_path, 3) as is_mine:
            assert not is_mine
        assert (tmp_path / "000003").exists()
        os.kill(holder.pid, signal.SIGKILL)
    with claimed(tmp_path, 3) as is_mine:
        assert is_mine
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_on_a_file_system_without_locks_every_claim_is_granted_and_nothing_stays_behind(
    number, config, drawn, draws, tmp_path, monkeypatch
):
    def without_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", without_locks)
    output = begun(config())
    with output.claim(3) as first, output.claim(3) as second:
        assert first
        assert second
        assert synthesize(config(), None, 1, 2)
    assert contents(tmp_path / "out") == contents(drawn)


def test_claims_that_a_kill_has_left_are_cleared_away_when_the_set_is_complete(config, drawn, draws, tmp_path):
    begun(config())
    (tmp_path / "out" / CLAIMS / "000002").touch()
    assert synthesize(config(), None)
    assert contents(tmp_path / "out") == contents(drawn)
