"""What `ccmdist status` says of a real run that was killed and went on."""

import json

import pytest

from ccmdist.cluster.ledger import read_ledger
from ccmdist.diagnostics.standing import standing

pytestmark = pytest.mark.distributed


def test_a_killed_run_that_went_on_tells_what_the_kill_has_cost(train_ranks):
    folder = train_ranks.folder / "run"
    assert train_ranks("run", 1, fault="sigkill@step:rank=0,step=3") == [-9]
    now = standing(folder)
    assert (now.state, now.step, now.num_steps) == ("killed", 2, 6)
    assert [(a.state, a.first_step, a.last_step, a.lost_steps) for a in now.attempts] == [("killed", 0, 3, 1)]
    assert train_ranks("run", 1) == [0]
    now = standing(folder)
    assert (now.state, now.step, now.committed_step) == ("done", 6, 6)
    assert [(a.state, a.first_step, a.last_step) for a in now.attempts] == [("killed", 0, 3), ("done", 2, 6)]
    figures = now.goodput
    assert (figures.num_failures, figures.lost_steps, figures.num_stops) == (1, 1, 0)
    assert figures.buckets_s["wasted"] > 0
    assert figures.recovery_s > 0
    events = read_ledger(folder / "ledger.jsonl")
    wall_s = events[-1]["time"] - events[0]["began"]
    # Tolerance: what the project promises of the buckets.
    assert sum(figures.buckets_s.values()) == pytest.approx(wall_s, rel=0.01)
    assert figures.buckets_s["other"] < 0.05 * wall_s
    assert json.loads((folder / "outcome.json").read_text())["state"] == now.last_exit.state == "done"
