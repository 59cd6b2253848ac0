"""Every second of the main thread is counted once, in the section that it was in."""

import os
import time

import pytest

from ccmdist.cluster import sections as module
from ccmdist.cluster.sections import Sections, job_began


class Clock:
    """Monotonic and wall clocks that stand still unless told."""

    def __init__(self):
        self.seconds = 0.0

    def monotonic(self):
        return 50.0 + self.seconds

    def time(self):
        return 1000.0 + self.seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_an_inner_section_does_not_count_for_its_outer_one(clock):
    sections = Sections(began=990.0)
    with sections("compute", 4):
        clock.seconds += 1
        with sections("data_wait", 4):
            clock.seconds += 10
        clock.seconds += 2
    clock.seconds += 5
    assert sections.taken() == {
        "startup": 10.0,
        "restore": 0.0,
        "data_wait": 10.0,
        "compute": 3.0,
        "validation": 0.0,
        "checkpoint": 0.0,
    }
    assert sections.totals["other"] == 5.0
    assert sum(sections.totals.values()) == sections.now() - sections.began
    assert set(sections.taken().values()) == {0.0}, "seconds were taken twice"


def test_a_section_that_fails_is_counted_and_its_step_is_not_done(clock):
    sections = Sections(began=1000.0)
    with pytest.raises(OSError), sections("compute", 7):
        clock.seconds += 3
        raise OSError
    assert sections.taken()["compute"] == 3.0
    assert (sections.done, sections.is_warm) == (7, False)
    with sections("compute", 7):
        pass
    assert (sections.done, sections.is_warm) == (8, True)


def test_an_open_section_counts_up_to_now_and_keeps_its_beginning(clock):
    sections = Sections(began=1000.0)
    with sections("checkpoint", 2):
        clock.seconds += 4
        since = sections.current.since
        assert sections.taken()["checkpoint"] == 4.0
        clock.seconds += 1
        assert sections.current.since == since
        assert sections.taken()["checkpoint"] == 1.0


def test_an_outer_section_goes_on_as_the_same_after_an_inner_one():
    sections = Sections(time.time())
    with sections("compute", 1):
        outer = sections.current
        with sections("data_wait", 1):
            assert sections.current.name == "data_wait"
        assert sections.current is outer
    assert sections.current.name == "other"


def test_a_wall_clock_that_jumps_breaks_no_times(clock, monkeypatch):
    sections = Sections(began=1000.0)
    monkeypatch.setattr(clock, "time", lambda: 1e9)
    clock.seconds += 2
    assert sections.now() == 1002.0


def test_a_job_that_began_in_the_future_of_this_clock_begins_now(clock):
    assert Sections(began=2000.0).began == 1000.0


def test_a_job_begins_when_its_script_says_or_else_when_its_process_was_made():
    assert job_began({"CCMDIST_JOB_START": "1700000000"}) == 1700000000
    for environment in ({}, {"CCMDIST_JOB_START": "yesterday"}):
        before = time.time()
        read_end, write_end = os.pipe()
        if os.fork() == 0:
            time.sleep(0.3)
            os.write(write_end, str(job_began(environment)).encode())
            os._exit(0)
        began = float(os.read(read_end, 100))
        assert began == pytest.approx(before, abs=0.15), "not within a few hundredths of the fork"
