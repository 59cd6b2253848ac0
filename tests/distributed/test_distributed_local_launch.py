"""Exit codes, deaths and signals of local ranks reach whoever started them."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

PROGRAM = """
import os, signal, sys, time
from ccmdist.cluster.local_launch import launch
from ccmdist.cluster.preemption import StopFlag, hold_back_stop_signals

def rank_main(job, ranks, rendezvous):
    if job == "die" and ranks.global_rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "refuse":
        return 78 if ranks.global_rank == 1 else time.sleep(60) or 0
    if job == "stop":
        with StopFlag(60) as stop:
            os.write(1, b"ready\\n")
            while not stop:
                time.sleep(0.01)
        os.write(1, f"stopped by {stop.reason}\\n".encode())
    if job == "die":
        time.sleep(60)
    return 0

if __name__ == "__main__":
    hold_back_stop_signals()
    print("launching", flush=True)
    sys.exit(launch("launching", "rank_main", sys.argv[1], 2))
elif __name__ == "launching":
    time.sleep(1)  # as long imports do
"""


@pytest.fixture
def start(tmp_path):
    script = tmp_path / "launching.py"
    script.write_text(textwrap.dedent(PROGRAM))

    def run(job):
        return subprocess.Popen(
            [sys.executable, str(script), job],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    return run


@pytest.mark.distributed
@pytest.mark.parametrize(("job", "code"), [("fine", 0), ("refuse", 78), ("die", 70)])
def test_the_exit_code_of_a_rank_is_that_of_the_launcher(start, job, code):
    begin = time.monotonic()
    process = start(job)
    _, stderr = process.communicate(timeout=50)
    assert process.returncode == code
    assert time.monotonic() - begin < 45, "a rank that waits for a dead one was not ended"
    if job == "die":
        assert "rank 1 was killed by SIGKILL; run the same command again" in stderr


@pytest.mark.distributed
def test_a_signal_to_the_launcher_reaches_every_rank(start):
    process = start("stop")
    assert process.stdout.readline() == "launching\n"
    assert process.stdout.readline() == "ready\n"
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR2)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.count("stopped by SIGUSR2") == 2
    assert process.returncode == 0


@pytest.mark.distributed
@pytest.mark.parametrize("wait_s", [0.0, 0.5])
def test_a_signal_that_comes_while_ranks_are_being_started_is_not_lost(start, wait_s):
    process = start("stop")
    assert process.stdout.readline() == "launching\n"
    time.sleep(wait_s)
    process.send_signal(signal.SIGUSR2)
    stdout, _ = process.communicate(timeout=30)
    assert stdout.count("stopped by SIGUSR2") == 2
    assert process.returncode == 0


@pytest.mark.distributed
def test_ranks_of_a_killed_launcher_stop_as_on_a_signal(start):
    process = start("stop")
    assert [process.stdout.readline() for _ in range(3)] == ["launching\n", "ready\n", "ready\n"]
    process.kill()
    stdout, _ = process.communicate(timeout=30)
    assert stdout.count("stopped by SIGTERM") == 2
