"""Of old checkpoints the newest are kept, and the one that was chosen as the best, whatever its age."""

import pytest

from ccmdist.cluster.best_checkpoint import BEST, BestCheckpoint, pointed_checkpoint, read_best
from ccmdist.errors import CheckpointError
from ccmdist.train.checkpoint import CheckpointStore, committed_paths
from tests.unit.train.one_rank import OneRank, state


def saved(run, *steps):
    """The steps that are kept after each of these was committed."""
    for step in steps:
        store = CheckpointStore(run / "checkpoints", OneRank(), keep=2, attempt=0)
        assert store.save(step, state(step), {}) == ""
    return [int(path.name[5:]) for path in committed_paths(run / "checkpoints")]


def point(run, step, checkpoint=None):
    name = f"checkpoints/step-{step:08d}" if checkpoint is None else checkpoint
    return BestCheckpoint(step, name, "cldice", 0.5, 6, 3).commit(run)


def test_the_chosen_checkpoint_outlives_newer_ones_until_another_is_chosen(tmp_path):
    assert saved(tmp_path, 1, 2, 3) == [2, 3]
    path = point(tmp_path, 2)
    assert saved(tmp_path, 4, 5, 6) == [2, 5, 6]
    assert pointed_checkpoint(path) == tmp_path / "checkpoints" / "step-00000002"
    point(tmp_path, 6)
    assert saved(tmp_path, 7, 8) == [6, 7, 8]


def test_a_chosen_checkpoint_that_is_among_the_newest_takes_no_place_of_theirs(tmp_path):
    saved(tmp_path, 1, 2)
    point(tmp_path, 2)
    assert saved(tmp_path, 3) == [2, 3]


def test_a_pointer_that_cannot_be_read_costs_no_checkpoint(tmp_path):
    saved(tmp_path, 1, 2)
    (tmp_path / BEST).write_text("{")
    assert saved(tmp_path, 3, 4) == [1, 2, 3, 4]


@pytest.mark.parametrize("checkpoint", ["../other", "checkpoints/../../x", "/etc", "checkpoints/step-1", ""])
def test_a_pointer_out_of_its_run_is_refused(tmp_path, checkpoint):
    path = point(tmp_path, 1, checkpoint)
    with pytest.raises(CheckpointError, match=rf"{path}: cannot be read .*; `ccmdist select run={tmp_path}` writes it"):
        read_best(path)


def test_a_pointer_tells_what_is_missing_and_how_to_get_it(tmp_path):
    with pytest.raises(CheckpointError, match=f"`ccmdist select run={tmp_path}` writes it"):
        pointed_checkpoint(tmp_path / BEST)
    path = point(tmp_path, 3)
    with pytest.raises(CheckpointError, match=r"points at .*step-00000003, which is not there; choose anew"):
        pointed_checkpoint(path)
