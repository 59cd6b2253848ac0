"""A signal sets a flag, whatever the main thread is doing; a hang ends by force."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from ccmdist.cluster.preemption import StopFlag, ignore_stop_signals


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_only_sets_the_flag(number):
    before = signal.getsignal(number)
    with StopFlag(forced_exit_s=60) as stop:
        assert not stop
        os.kill(os.getpid(), number)
        time.sleep(0.05)
        assert stop
        assert stop.reason == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_the_first_signal_is_the_reason():
    with StopFlag(forced_exit_s=60) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert stop.reason == "SIGUSR2"


def test_a_process_that_hangs_in_c_ends_by_force_and_shows_where():
    program = """
        import ctypes, os, signal
        from ccmdist.cluster.preemption import StopFlag
        with StopFlag(forced_exit_s=0.2):
            os.kill(os.getpid(), signal.SIGUSR2)
            ctypes.CDLL(None).sleep(30)   # C code that does not let Python handlers run
    """
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=25)
    assert done.returncode == 70
    assert "forced exit: SIGUSR2 came" in done.stderr
    assert "ctypes" in done.stderr or "<string>" in done.stderr
    assert time.monotonic() - start < 20


def test_a_worker_ignores_every_stop_signal():
    pid = os.fork()
    if pid == 0:
        ignore_stop_signals()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
