"""The ledger of a real run that was killed and went on tells where all its wall time went."""

import functools
import json
import multiprocessing.util
import time
from pathlib import Path

import pytest

from ccmdist.cluster.ledger import BUCKETS, SECTIONS, buckets, ettr, read_ledger
from tests.distributed.small_world import losses

pytestmark = pytest.mark.distributed


def note_the_time(folder, rank):
    """Write down when this process of rank 0 did its first and its last things, on the wall clock."""
    if rank == 0:
        began = time.time()
        multiprocessing.util.Finalize(None, lambda: _note(folder, began), exitpriority=-100)


def _note(folder, began):
    with (Path(folder) / "times").open("a") as file:
        file.write(json.dumps([began, time.time()]) + "\n")


def test_the_buckets_of_a_killed_and_resumed_run_sum_to_its_wall_time(train_ranks):
    folder = train_ranks.folder
    patch = functools.partial(note_the_time, str(folder))
    begins = [time.time()]
    assert train_ranks("run", 2, fault="sigkill@step:rank=1,step=3", patch=patch) == [70, -9]
    begins.append(time.time())
    assert train_ranks("run", 2, patch=patch) == [0, 0]
    events, times = read_ledger(folder / "run" / "ledger.jsonl"), (folder / "times").read_text().splitlines()
    starts = [event["began"] for event in events if event["event"] == "attempt"]
    (first, lost), (again, ended) = map(json.loads, times)
    # A job begins when its process is made: after this test asked for it, before the first thing that it does.
    assert begins[0] <= starts[0] + 0.02
    assert starts[0] <= first + 0.02
    assert begins[1] <= starts[1] + 0.02
    assert starts[1] <= again + 0.02
    spent, wall_s = buckets(events), ended - starts[0]
    assert sum(spent.values()) == pytest.approx(wall_s, rel=0.01)
    assert spent["queue"] == pytest.approx(starts[1] - lost, abs=0.01 * wall_s)
    assert spent["other"] < 0.05 * (wall_s - spent["queue"]), "what is not in a section is more than small change"
    assert all(spent[section] > 0 for section in SECTIONS)
    # Steps 3 and half of 4 were done again, which took the first attempt what it wrote after its commit of step 2.
    commit = next(number for number, event in enumerate(events) if event["event"] == "commit")
    lost_lines = [event for event in events[commit:] if event["attempt"] == 0 and event["event"] == "section"]
    assert spent["wasted"] == pytest.approx(sum(line["seconds"] for line in lost_lines))
    assert {line["last_step"] for line in lost_lines} == {3}
    assert [event["event"] for event in events if event["event"] in ("attempt", "end")] == ["attempt", "attempt", "end"]
    assert [event["step"] for event in events if event["event"] == "attempt"] == [0, 2]
    assert [event["step"] for event in events if event["event"] == "commit"] == [2, 4, 6]
    for bucket in BUCKETS:
        curve = losses(folder / "run", f"goodput/{bucket}_s")
        assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6]
        seconds = [value for _, value in curve]
        assert seconds[2:] == sorted(seconds[2:]), f"{bucket} shrinks within an attempt"
    shown = dict(losses(folder / "run", "goodput/ettr"))
    assert shown[6] == pytest.approx(ettr(spent), rel=0.2), "the end of the run is not in the curve"
