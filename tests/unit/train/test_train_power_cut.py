"""What a save has told to be committed is there after a power cut at any later moment, on any honest file system."""

import shutil

import pytest

from ccmdist.train.checkpoint import CheckpointStore, newest_valid
from tests.unit.train.disk_of_a_power_cut import RecordedDisk
from tests.unit.train.one_rank import OneRank, holds, state

STEPS = (1, 2, 3, 4)


@pytest.fixture(scope="module")
def saves(tmp_path_factory):
    """The operations of four saves, of which the first two are removed again, with a mark after each."""
    root = tmp_path_factory.mktemp("run")
    with RecordedDisk(root) as disk:
        for attempt, step in enumerate(STEPS):
            store = CheckpointStore(root / "checkpoints", OneRank(), keep=2, attempt=attempt)
            store.newest()
            assert store.save(step, state(step), {}) == ""
            disk.note(step)
    return disk


@pytest.mark.parametrize("only_flushed_names", [True, False])
def test_a_power_cut_at_any_operation_loses_no_committed_checkpoint(saves, tmp_path, only_flushed_names):
    promised, cuts = 0, 0
    for number, event in enumerate([*saves.events, ("end",)]):
        left = tmp_path / str(number)
        saves.after(number).write(left, only_flushed_names)
        newest = newest_valid(left / "checkpoints")
        assert (newest.step if newest else 0) >= promised, (number, event)
        assert newest is None or holds(newest, newest.step)
        shutil.rmtree(left)
        promised = event[1] if event[0] == "mark" else promised
        cuts += event[0] != "mark"
    assert cuts > 15 * len(STEPS)
    assert promised == STEPS[-1]


def test_the_recorded_disk_is_the_real_one_when_nothing_is_cut(saves, tmp_path):
    saves.after(len(saves.events)).write(tmp_path / "left", only_flushed_names=False)
    here, there = (
        {str(path.relative_to(root)): path.is_file() and path.read_bytes() for path in sorted(root.rglob("*"))}
        for root in (tmp_path / "left", saves.root)
    )
    assert here == there
