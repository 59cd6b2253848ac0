"""A disk that is full at any operation of a save costs that save at most, and says where."""

from itertools import count

import pytest

from ccmdist.cluster.faults import VARIABLE
from ccmdist.train.checkpoint import CheckpointStore, committed_paths, newest_valid
from tests.unit.train.one_rank import OneRank, holds, state


def saved(folder, step):
    return CheckpointStore(folder, OneRank(), keep=2, attempt=0).save(step, state(step), {})


def test_a_full_disk_at_any_operation_of_a_save_leaves_what_was_committed(monkeypatch, tmp_path, capsys):
    problems = []
    for number in count(1):
        folder = tmp_path / str(number)
        monkeypatch.delenv(VARIABLE, raising=False)
        assert [saved(folder, step) for step in (1, 2)] == ["", ""]
        monkeypatch.setenv(VARIABLE, f"enospc@checkpoint.begin:rank=0,step=3,operation={number}")
        problems.append(saved(folder, 3))
        if "fault" not in capsys.readouterr().err:
            break  # the save had fewer operations
        newest = newest_valid(folder)
        assert holds(newest, newest.step)
        assert newest.step == 3 if not problems[-1] else newest.step >= 2
        assert not list(folder.glob("*.tmp-*"))
        monkeypatch.delenv(VARIABLE)
        assert [saved(folder, step) for step in (3, 4)] == ["", ""]
        assert holds(newest_valid(folder), 4)
        assert len(committed_paths(folder)) in (2, 3)  # a full disk may keep an old one from being removed
    with pytest.raises(OSError, match="fault at"):  # an audit hook stays; this one is not for other tests
        for spent in range(number):
            (tmp_path / f"spent-{spent}").mkdir()
    assert all("No space left on device" in problem for problem in problems if problem)
    # All operations up to the commit count; those that remove old checkpoints afterwards do not.
    assert 8 <= sum(bool(problem) for problem in problems) < len(problems) - 1
