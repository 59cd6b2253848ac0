"""A main thread that stays too long in one place is shown and ended, and the rank that others wait for is named."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ccmdist.cluster import watchdog as module
from ccmdist.cluster.ranks import Ranks
from ccmdist.cluster.sections import Section, Sections
from ccmdist.cluster.watchdog import Report, Watchdog, blame
from ccmdist.config.train import TimeoutSettings


def at(section, step, waits, frame="read (tarfile.py:7)"):
    return Report(section, step, 31.0, frame, waits)


WAITING = at("compute", 4, True, "all_reduce (distributed/distributed_c10d.py:1)")


def test_ranks_that_do_not_answer_are_to_blame():
    assert blame({0: WAITING, 2: WAITING}, 3) == "rank 1 does not answer (stopped, dead or unreachable)"
    assert blame({0: WAITING}, 3) == "ranks 1, 2 do not answer (stopped, dead or unreachable)"
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16 and 83 more do" in blame({0: WAITING}, 100)


def test_else_the_rank_outside_a_collective_is_to_blame():
    reports = {0: WAITING, 1: at("data_wait", 4, False), 2: WAITING}
    assert blame(reports, 3) == (
        "the others wait in compute after step 4 for rank 1, since 31 s in data_wait after step 4 "
        "at read (tarfile.py:7)"
    )


@pytest.mark.parametrize("waits", [True, False])
def test_else_the_hindmost_rank_is_to_blame(waits):
    ahead, behind = at("checkpoint", 5, waits), at("compute", 4, waits)
    assert "in checkpoint after step 5 for rank 0, since 31 s in compute after step 4" in blame(
        {0: behind, 1: ahead}, 2
    )
    ahead, behind = at("validation", 5, waits), at("other", 5, waits)
    assert "for ranks 1, 2, since" in blame({0: ahead, 1: behind, 2: behind}, 3)


@pytest.mark.parametrize("waits", [True, False])
def test_else_nobody_is_to_blame(waits):
    assert blame({0: at("compute", 4, waits), 1: at("compute", 4, waits)}, 2) == (
        "all ranks answer and are in compute after step 4: suspect the network, a device or the file system"
    )


def test_each_section_has_its_limit_and_all_that_a_first_step_does_counts_as_setup():
    timeouts = TimeoutSettings(setup_min=60, step_min=1, validation_min=90, checkpoint_min=3)
    sections = Sections(time.time())
    watchdog = Watchdog(sections, timeouts, Ranks(0, 0, 1), lambda: None)
    names = ("startup", "restore", "data_wait", "compute", "other", "validation", "checkpoint")
    before = [watchdog.limit(Section(name, 0, 0.0)) for name in names]
    assert before == [*[("setup_min", 3600)] * 5, ("validation_min", 5400), ("setup_min", 3600)]
    with sections("compute", 0):
        pass
    after = [watchdog.limit(Section(name, 1, 0.0)) for name in names]
    assert after == [
        *[("setup_min", 3600)] * 2,
        *[("step_min", 60)] * 3,
        ("validation_min", 5400),
        ("checkpoint_min", 180),
    ]


def test_collectives_fail_later_than_any_watchdog_ends_the_process():
    timeouts = TimeoutSettings(setup_min=5, step_min=1, validation_min=7, checkpoint_min=3, answer_s=60)
    last_words_min = (3 * timeouts.answer_s + 10) / 60
    assert timeouts.collective_min >= 7 + last_words_min


HANG = """
    import ctypes, time
    from ccmdist.cluster.ranks import Ranks
    from ccmdist.cluster.sections import Sections
    from ccmdist.cluster.watchdog import Watchdog
    from ccmdist.config.train import TimeoutSettings
    from ccmdist.console import start_logging

    start_logging()
    sections = Sections(time.time())
    timeouts = TimeoutSettings(setup_min=0.005, step_min=0.005)
    with Watchdog(sections, timeouts, Ranks(0, 0, 1), lambda: print("last words", flush=True)):
        {}
"""


def run(body):
    program = textwrap.dedent(HANG).format(body)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)


def test_a_process_that_hangs_in_c_shows_where_and_ends_by_force():
    done = run("""with sections("restore", 3): ctypes.CDLL(None).sleep(40)""")
    assert done.returncode == 70
    assert "hang: restore after step 3 for 0 s, longer than timeouts.setup_min allows; main thread at <module>" in (
        done.stderr
    )
    assert "rank 0: stacks of all threads" in done.stderr
    assert '"<string>", line' in done.stderr
    assert done.stdout == "last words\n"


def test_a_process_that_hangs_between_sections_ends_too():
    assert run("time.sleep(40)").returncode == 70


def test_a_process_that_goes_on_is_left_alone():
    done = run("""[exec("with sections('compute', n): time.sleep(0.05)") for n in range(20)]""")
    assert (done.returncode, done.stderr) == (0, "")


class Board:
    """A store of torch.distributed in one process."""

    def __init__(self):
        self.values = {}

    def set(self, key, value):
        self.values[key] = value.encode()

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return self.values.keys() >= set(keys)

    def clone(self):
        return self


@pytest.fixture
def ended(monkeypatch):
    """Set when a watchdog would have ended this process; it then waits instead."""
    ended = threading.Event()

    def leave(code):
        assert code == 70
        ended.set()
        threading.Event().wait()

    monkeypatch.setattr(module.os, "_exit", leave)
    monkeypatch.setattr(module, "show_stacks", lambda why: None)
    monkeypatch.setattr("ccmdist.console.log.propagate", True)
    return ended


def test_a_called_rank_answers_and_ends_although_its_own_time_is_not_up(ended, caplog):
    board = Board()
    with Watchdog(Sections(time.time()), TimeoutSettings(answer_s=0.2), Ranks(1, 1, 2), lambda: None) as watchdog:
        watchdog.listen(board)
        board.set(module.ALARM, "")
        assert ended.wait(20)
    assert '"section": "other"' in board.get("watchdog/report/1").decode()
    told = [record.getMessage() for record in caplog.records]
    assert "and another rank waits too long" in told[0]
    assert told[1] == "hang: rank 0 does not answer (stopped, dead or unreachable)"


def test_a_store_that_does_not_answer_delays_the_end_but_does_not_prevent_it(ended, caplog):
    board = Board()
    board.set = lambda key, value: time.sleep(600)
    timeouts = TimeoutSettings(setup_min=0.002, step_min=0.002, answer_s=0.2)
    with Watchdog(Sections(time.time()), timeouts, Ranks(1, 1, 2), lambda: None) as watchdog:
        watchdog.listen(board)
        assert ended.wait(20)
    assert "rank 0 does not answer" in caplog.records[-1].getMessage()


def test_words_that_cannot_be_said_do_not_prevent_the_end(ended, monkeypatch):
    monkeypatch.setattr(module.log, "error", lambda *arguments: time.sleep(600))
    monkeypatch.setattr(module, "_within", lambda seconds, action, otherwise: original(0.2, action, otherwise))
    with Watchdog(
        Sections(time.time()), TimeoutSettings(setup_min=0.002, step_min=0.002), Ranks(0, 0, 1), lambda: None
    ):
        assert ended.wait(20)


original = module._within


def test_a_process_that_was_suspended_does_not_hang(monkeypatch):
    """Looks are counted, not seconds: however long a look takes, it is one."""
    timeouts = TimeoutSettings(setup_min=0.1, step_min=0.1, answer_s=0.1)
    watchdog = Watchdog(Sections(time.time()), timeouts, Ranks(0, 0, 1), lambda: None)
    looks, ends = iter(range(5)), []
    monkeypatch.setattr(watchdog._finished, "wait", lambda seconds: next(looks, None) is None)
    monkeypatch.setattr(module.time, "monotonic", lambda: 1e9)
    monkeypatch.setattr(module, "_within", lambda seconds, action, otherwise: ends.append(seconds))
    monkeypatch.setattr(module.os, "_exit", ends.append)
    watchdog._watch()
    assert not ends
