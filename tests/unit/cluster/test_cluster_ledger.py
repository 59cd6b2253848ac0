"""Whatever happens to a run, its buckets sum to its wall time, and wasted is what was done again."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.cluster import sections as module
from ccmdist.cluster.ledger import BUCKETS, Ledger, buckets, ettr, read_ledger
from ccmdist.cluster.ranks import Job
from ccmdist.cluster.run_directory import Outcome
from ccmdist.cluster.sections import Sections


class World:
    """A clock, a file system with one run, and what really happened in it, counted apart from the ledger."""

    def __init__(self, path):
        self.path, self.seconds = path, 0.0
        self.committed = 0
        self.done_in = {}
        """Step -> seconds of the last time it was done."""
        self.wasted = 0.0
        self.queue = 0.0
        self.last_line = None

    def monotonic(self):
        return self.seconds

    def time(self):
        return 1e6 + self.seconds

    def attempt(self, fate):
        """One attempt: queue, startup, restore, then steps until it is killed, stopped or done."""
        self.seconds += fate["queue"]
        if self.last_line is not None:
            self.queue += self.seconds - self.last_line
        began = self.time()
        self.seconds += fate["startup"]
        sections = Sections(began)
        ledger = Ledger(self.path, sections)
        ledger.begin(self.committed, Job("7", "", 0), 2, 0)
        with sections("restore"):
            self.seconds += fate["restore"]
        for step in [step for step in self.done_in if step > self.committed]:
            self.wasted += self.done_in.pop(step)
        ledger.resumed(self.committed)
        self._steps(fate, sections, ledger)
        if fate["end"] != "killed":
            ledger.flush(sections.done)
        if fate["end"] == "stopped":
            ledger.end(Outcome("requeue", "stopped", self.committed))
        self.last_line = read_ledger(self.path)[-1]["time"] - 1e6

    def _steps(self, fate, sections, ledger):
        for number, (wait, compute, look, save) in enumerate(fate["steps"]):
            step = sections.done if number else self.committed
            with sections("compute", step):
                with sections("data_wait", step):
                    self.seconds += wait
                self.seconds += compute
            done = step + 1
            self.done_in[done] = wait + compute
            if fate["log_every"] and done % fate["log_every"] == 0:
                ledger.flush(done)
            with sections("validation", done):
                self.seconds += look
            self.done_in[done] += look
            if save:
                with sections("checkpoint", done):
                    self.seconds += save
                self.done_in[done] += save
                self.committed = done
                ledger.commit(done, save)
        if fate["end"] == "lost":  # rank 0 sees its connection break in the middle of the next step
            step = sections.done if fate["steps"] else self.committed
            with sections("compute", step):
                self.seconds += fate["partial"]
                ledger.flush(step)
            self.done_in[step + 1] = fate["partial"]


durations = st.floats(0.01, 30.0)
steps = st.tuples(durations, durations, st.sampled_from([0.0, 2.5]), st.sampled_from([0.0, 0.0, 1.5]))
fates = st.fixed_dictionaries(
    {
        "queue": st.floats(0.0, 500.0),
        "startup": durations,
        "restore": durations,
        "steps": st.lists(steps, max_size=6),
        "log_every": st.sampled_from([1, 2, 3]),
        "partial": durations,
        "end": st.sampled_from(["killed", "lost", "stopped"]),
    }
)


@settings(max_examples=60)
@given(st.lists(fates, min_size=1, max_size=5))
def test_buckets_sum_to_the_wall_time_and_wasted_is_what_was_done_again(tmp_path_factory, lives):
    world = World(tmp_path_factory.mktemp("run") / "ledger.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", world)
        for fate in lives:
            world.attempt(fate)
    events = read_ledger(world.path)
    spent = buckets(events)
    wall_s = world.last_line - (events[0]["began"] - 1e6)
    assert sum(spent.values()) == pytest.approx(wall_s, rel=0.01)
    assert all(seconds >= 0 for seconds in spent.values())
    assert spent["queue"] == pytest.approx(world.queue, abs=0.01)
    assert spent["other"] == pytest.approx(0.0, abs=0.01)
    # What a killed attempt did after its last line is known to nobody; the ledger counts it as queue.
    if all(fate["log_every"] == 1 and (fate["end"] != "killed" or not fate["steps"]) for fate in lives):
        assert spent["wasted"] == pytest.approx(world.wasted, abs=0.01)
    assert spent["wasted"] <= world.wasted + 0.01
    assert 0 <= ettr(spent) <= ettr(spent, with_queue=False) <= 1


@pytest.fixture
def world(tmp_path, monkeypatch):
    world = World(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(module, "time", world)
    return world


PLAIN = {"queue": 0.0, "startup": 10.0, "restore": 5.0, "log_every": 1, "partial": 4.0, "end": "lost"}


def test_a_run_that_lost_steps_reads_as_it_was(world):
    world.attempt(PLAIN | {"steps": [(1, 9, 0, 0), (1, 9, 2, 3), (1, 9, 0, 0)]})
    world.attempt(PLAIN | {"queue": 60.0, "steps": [(1, 9, 0, 2)], "end": "stopped"})
    assert buckets(read_ledger(world.path)) == pytest.approx(
        {
            "startup": 20.0,
            "restore": 10.0,
            "data_wait": 3.0,
            "compute": 27.0,
            "validation": 2.0,
            "checkpoint": 5.0,
            "wasted": 14.0,
            "queue": 60.0,
            "other": 0.0,
        }
    )
    assert ettr(buckets(read_ledger(world.path))) == pytest.approx(30 / 141)
    assert ettr(buckets(read_ledger(world.path)), with_queue=False) == pytest.approx(30 / 81)


def test_what_the_writer_says_it_has_spent_is_what_readers_find(world):
    world.attempt(PLAIN | {"steps": [(1, 9, 0, 2), (1, 9, 0, 0)]})
    world.seconds += 20
    sections = Sections(world.time())
    ledger = Ledger(world.path, sections)
    ledger.begin(1, None, 1, 0)
    with sections("restore"):
        world.seconds += 3
    ledger.resumed(1)
    with sections("compute", 1):
        world.seconds += 4
    world.seconds += 1
    ledger.flush(2)
    assert ledger.spent() == pytest.approx(buckets(read_ledger(world.path)))
    assert ledger.spent()["wasted"] == pytest.approx(14.0)


def test_a_step_that_was_broken_off_right_after_a_commit_is_wasted(world):
    world.attempt(PLAIN | {"steps": [(1, 9, 0, 2)]})
    assert buckets(read_ledger(world.path))["wasted"] == 0.0, "nothing has been done again yet"
    world.attempt(PLAIN | {"steps": []})
    assert buckets(read_ledger(world.path))["wasted"] == pytest.approx(4.0)


def test_a_checkpoint_that_turned_out_to_be_broken_wastes_its_steps(world):
    world.attempt(PLAIN | {"steps": [(1, 9, 0, 2), (1, 9, 0, 2)], "end": "stopped"})
    sections = Sections(world.time())
    ledger = Ledger(world.path, sections)
    ledger.begin(2, None, 1, 0)
    with sections("restore"):
        world.seconds += 1
    ledger.resumed(1)
    assert buckets(read_ledger(world.path))["wasted"] == pytest.approx(12.0)


def test_lines_hold_what_the_format_says(world):
    world.attempt(PLAIN | {"steps": [(1, 9, 0, 2)], "end": "stopped"})
    lines = [json.loads(line) for line in world.path.read_text().splitlines()]
    assert {line["event"] for line in lines} == {"attempt", "section", "commit", "end"}
    assert lines[0].keys() == {
        *("time", "attempt", "event", "step", "began", "job", "restart", "ranks", "gpus", "host"),
    }
    commit = next(line for line in lines if line["event"] == "commit")
    assert commit == {"time": 1000027.0, "attempt": 0, "event": "commit", "step": 1, "seconds": 2}
    assert [(line["section"], line["seconds"], line["step"], line["last_step"]) for line in lines[1:-2]] == [
        ("startup", 10.0, 0, 0),
        ("restore", 5.0, 0, 0),
        ("data_wait", 1.0, 0, 1),
        ("compute", 9.0, 0, 1),
        ("checkpoint", 2.0, 1, 1),
    ]
    end = {"time": 1000027.0, "attempt": 0, "event": "end", "state": "requeue", "reason": "stopped", "step": 1}
    assert lines[-1] == end


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.binary(max_size=5))
def test_a_line_torn_at_any_byte_costs_that_line_alone(tmp_path_factory, cut, rubbish):
    world = World(tmp_path_factory.mktemp("run") / "ledger.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", world)
        world.attempt(PLAIN | {"steps": [(1, 9, 0, 2)]})
        whole = world.path.read_bytes()
        cut %= len(whole) + 1
        world.path.write_bytes(whole[:cut] + rubbish)
        before = whole[:cut].count(b"\n")
        world.attempt(PLAIN | {"steps": []})
    events = read_ledger(world.path)
    assert before <= len([event for event in events if event["time"] < 1e6 + 32]) <= before + 1
    assert next(event["event"] for event in events if event["time"] > 1e6 + 32) == "attempt"


values = st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.integers(), max_size=2))
keys = ("time", "attempt", "event", "step", "last_step", "began", "seconds", "section", "state")
kinds = st.one_of(values, st.sampled_from(["attempt", "section", "commit", "end"]))
strange = st.fixed_dictionaries({}, optional=dict.fromkeys(keys, values | st.integers(0, 9)) | {"event": kinds})


@settings(max_examples=100)
@given(st.lists(strange, max_size=6))
def test_whatever_a_ledger_holds_an_attempt_can_begin_and_its_times_are_sound(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ledger = Ledger(path, Sections(0.0))
    ledger.begin(0, None, 1, 0)
    ledger.resumed(0)
    assert all(0 <= seconds < 1e14 for seconds in (buckets(read_ledger(path)) | ledger.spent()).values())


def test_a_ledger_that_is_not_there_is_empty(tmp_path):
    assert read_ledger(tmp_path / "ledger.jsonl") == []
    assert buckets([]) == dict.fromkeys(BUCKETS, 0.0)
    assert ettr(buckets([])) == 0.0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_told_once_and_ends_nothing(world, caplog, monkeypatch):
    monkeypatch.setattr("ccmdist.console.log.propagate", True)
    monkeypatch.setattr("ccmdist.cluster.ledger.read_ledger", lambda path: [])
    sections = Sections(world.time())
    ledger = Ledger(Path("/dev/full"), sections)
    ledger.begin(0, None, 1, 0)
    with sections("compute", 0):
        world.seconds += 3
    ledger.commit(1, 0.5)
    assert [record.getMessage() for record in caplog.records] == [
        "/dev/full: could not be written ([Errno 28] No space left on device); training goes on, its times are not kept"
    ]
    assert ledger.spent()["compute"] == 3.0


def test_a_ledger_in_a_folder_that_cannot_be_opened_ends_nothing(world, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("ccmdist.console.log.propagate", True)
    (tmp_path / "in the way").write_text("")
    ledger = Ledger(tmp_path / "in the way" / "ledger.jsonl", Sections(world.time()))
    ledger.begin(0, None, 1, 0)
    ledger.resumed(0)
    ledger.end(Outcome("done", "all", 1))
    assert len(caplog.records) == 1


def test_what_was_not_begun_writes_nothing(tmp_path):
    sections = Sections(0.0)
    ledger = Ledger(tmp_path / "ledger.jsonl", sections)
    ledger.resumed(0)
    ledger.commit(1, 1.0)
    ledger.end(Outcome("done", "all", 1))
    assert not list(tmp_path.iterdir())
