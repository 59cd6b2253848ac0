"""Faults strike where they are asked for, at the operation they are asked for, and nowhere else."""

import errno
import os
import signal

import pytest

from ccmdist.cluster.faults import VARIABLE, fault_point
from ccmdist.commit import commit_text
from ccmdist.errors import RunError

OPERATIONS_OF_A_COMMIT = 5
"""Create, open to write, flush the file, rename, flush the folder; nothing is left to be removed."""


def exit_code(function):
    """How a forked process that runs ``function`` ends: negative when a signal killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("action", ["sigkill", "sigterm", "sigusr2"])
def test_a_fault_strikes_its_rank_at_its_point_and_step_only(monkeypatch, action):
    monkeypatch.setenv(VARIABLE, f"sigkill@other:rank=0,step=1; {action}@save.begin:rank=1,step=30")
    for name, rank, step in (("save.begin", 1, 3), ("save.begin", 0, 30), ("save.end", 1, 30)):
        assert exit_code(lambda n=name, r=rank, s=step: fault_point(n, r, s)) == 0
    number = getattr(signal, action.upper())

    def struck():
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        fault_point("save.begin", 1, 30)

    assert exit_code(struck) == -number


def test_a_kill_at_every_operation_of_a_commit_is_possible(monkeypatch, tmp_path):
    def commit_after(number):
        monkeypatch.setenv(VARIABLE, f"sigkill@save.begin:rank=0,step=1,operation={number}")

        def function():
            fault_point("save.begin", 0, 1)
            commit_text(tmp_path / f"{number}.txt", "whole")

        return exit_code(function)

    for number in range(1, OPERATIONS_OF_A_COMMIT + 1):
        assert commit_after(number) == -signal.SIGKILL
        # The last one is the flush of the folder: the file has its name by then.
        assert (tmp_path / f"{number}.txt").exists() == (number == OPERATIONS_OF_A_COMMIT)
    assert commit_after(100) == 0


def test_a_full_disk_is_met_by_the_operation_that_is_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(VARIABLE, "enospc@save.begin:rank=0,step=1,operation=2")
    fault_point("save.begin", 0, 1)
    (tmp_path / "first").mkdir()
    with pytest.raises(OSError, match=r"fault at save\.begin") as caught:
        (tmp_path / "second").write_text("does not fit")
    assert caught.value.errno == errno.ENOSPC
    (tmp_path / "third").write_text("fits again")
    assert capsys.readouterr().err == "fault: enospc@save.begin:rank=0,step=1,operation=2\n"


@pytest.mark.parametrize("text", ["sigkill", "sigsegv@a:rank=0,step=1", "sigkill@a:rank=0,step=1,operation=0"])
def test_a_variable_that_cannot_be_read_is_told(monkeypatch, text):
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(RunError) as caught:
        fault_point("a", 0, 1)
    expected = f"CCMDIST_FAULT: cannot read {text!r}; write ACTION@POINT:rank=R,step=S[,operation=K]"
    assert str(caught.value) == expected
