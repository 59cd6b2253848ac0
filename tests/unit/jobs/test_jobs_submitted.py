"""Submitit runs a stage, and nothing of Submitit's own takes a signal once the stage has begun."""

import json
import os
import subprocess
import sys

import pytest
from submitit.core.utils import DelayedSubmission, cloudpickle_dump, pickle_load

from ccmdist.jobs.submitted import SubmittedStage

# A process as srun starts it, up to the stage, which is signalled before, while and after it listens.
PROCESS = """
import os, signal, sys, time
from ccmdist import cli
from ccmdist.cluster.preemption import StopFlag
from ccmdist.jobs import submitted

held_back = submitted.hold_back_stop_signals
submitted.hold_back_stop_signals = lambda: (held_back(), os.kill(os.getpid(), signal.SIGUSR1))

def exit_code(arguments):
    os.kill(os.getpid(), signal.SIGUSR2)
    print("called with", *arguments, flush=True)
    with StopFlag(60) as stop:
        time.sleep(0.05)
        print("stopped by", stop.reason, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGCONT)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT):
        os.kill(os.getpid(), number)
    time.sleep(0.05)
    return int(sys.argv[2])

cli.exit_code = exit_code
from submitit.core.submission import process_job
process_job(sys.argv[1])
"""


@pytest.fixture
def process(tmp_path):
    """Run a process of a job whose stage ends with ``code`` and, in training, leaves an outcome."""

    def run(code, state=None):
        if state:
            (tmp_path / "outcome.json").write_text(json.dumps({"state": state, "reason": "", "step": 1}))
        folder = tmp_path / "submitit"
        folder.mkdir()
        DelayedSubmission(SubmittedStage("train", str(tmp_path), ("--allow-change=seed",))).dump(
            folder / "7_submitted.pkl"
        )
        slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, str(folder), str(code)],
            env=os.environ | slurm | {"SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout + done.stderr, folder / "7_0_result.pkl"

    return run


@pytest.mark.parametrize(
    ("code", "state", "expected"),
    [(75, None, 75), (78, None, 78), (0, "requeue", 0), (70, "done", 70)],
)
def test_an_attempt_that_is_not_the_last_leaves_no_result(process, code, state, expected, tmp_path):
    found, told, result = process(code, state)
    assert found == expected, told
    assert f"called with train {tmp_path}/config.json --allow-change=seed\nstopped by SIGUSR1\n" in told
    assert not any(text in told for text in ("Bypassing", "Caught signal", "checkpoint method", "Requeued")), told
    assert not result.exists()


@pytest.mark.parametrize("state", [None, "done"])
def test_an_attempt_that_did_all_leaves_a_result_for_submitit(process, state):
    code, told, result = process(0, state)
    assert code == 0, told
    assert "Job completed successfully" in told
    assert pickle_load(result) == ("success", None)


def test_a_signal_before_the_work_is_called_submits_the_same_again(tmp_path):
    stage = SubmittedStage("train", "/j")
    again = stage.checkpoint()
    assert again.function == stage
    cloudpickle_dump(stage, tmp_path / "stage.pkl")
    assert pickle_load(tmp_path / "stage.pkl") == stage
    written = (tmp_path / "stage.pkl").read_bytes()
    assert b"/j" in written
    assert len(written) < 300, "it carries more than names"
