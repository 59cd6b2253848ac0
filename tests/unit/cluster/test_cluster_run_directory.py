"""A run has one holder, one set of settings, and says how it ended."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.errors import RunError


def settings(*overrides):
    return load(TrainConfig, [], ["run=runs/a", "data.shards=s", "data.model=m", *overrides])


def test_a_run_in_use_is_refused_and_its_holder_named(tmp_path):
    program = (
        "import sys; from pathlib import Path; from ccmdist.cluster.run_directory import RunDirectory\n"
        "run = RunDirectory(Path(sys.argv[1])); run.hold(); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"is in use by process {holder.pid} on .*; wait for it to end"):
        RunDirectory(tmp_path).hold()
    holder.kill()
    holder.wait()
    RunDirectory(tmp_path).hold()  # a killed holder leaves no lock behind


@pytest.fixture
def holder(tmp_path):
    """A process that holds the run as the first start of job 7."""
    program = (
        "import sys; from pathlib import Path; from ccmdist.cluster.run_directory import RunDirectory\n"
        "run = RunDirectory(Path(sys.argv[1])); run.hold(); print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"SLURM_JOB_ID": "7"}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        assert holder.stdout.readline() == "held\n"
        yield holder
        holder.kill()


def test_a_lock_that_an_earlier_start_of_the_job_has_left_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    threading.Timer(1, holder.kill).start()
    RunDirectory(tmp_path).hold()
    assert json.loads((tmp_path / "owner.json").read_text())["restart"] == 1


@pytest.mark.parametrize(("job", "restart"), [("7", "0"), ("8", "1"), ("", "")])
def test_a_lock_of_somebody_else_is_not_waited_for(tmp_path, holder, monkeypatch, job, restart):
    monkeypatch.setattr("ccmdist.cluster.run_directory.LOST_NODE_S", 0.1)
    for name, value in (("SLURM_JOB_ID", job), ("SLURM_RESTART_COUNT", restart)):
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name, raising=False)
    waited = []
    monkeypatch.setattr("ccmdist.cluster.run_directory.log.warning", lambda *words: waited.append(words))
    with pytest.raises(RunError, match=r"is in use by process \d+ of job 7 on "):
        RunDirectory(tmp_path).hold()
    assert not waited


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose a run folder that you may write to"):
        RunDirectory(tmp_path / "file" / "run").hold()


def test_a_changed_setting_is_refused_with_both_values_unless_allowed(tmp_path):
    run = RunDirectory(tmp_path)
    run.accept(settings("optim.lr=1e-4"))
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    with pytest.raises(RunError, match=r"optim\.lr: 0\.0001 -> 0\.0002") as problem:
        run.accept(settings("optim.lr=2e-4"))
    assert "--allow-change optim.lr" in str(problem.value)
    run.accept(settings("optim.lr=1e-4", "processes=8"))
    run.accept(settings("optim.lr=2e-4"), frozenset({"optim.lr"}))
    assert json.loads(run.config.read_text())["settings"]["optim"]["lr"] == 2e-4


def test_a_run_of_another_objective_is_not_offered_to_be_taken_over(tmp_path):
    run = RunDirectory(tmp_path)
    run.accept(settings())
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    with pytest.raises(RunError, match=r"objective\.kind: \(absent\) -> segment") as problem:
        run.accept(settings("objective.kind=segment", "adapter=null", "base=null", "activation_checkpointing=null"))
    assert str(problem.value).endswith("\nchoose another run folder, or restore the settings")


def test_before_anything_is_committed_settings_may_be_corrected(tmp_path):
    run = RunDirectory(tmp_path)
    run.accept(settings("optim.lr=1e-4"))
    run.accept(settings("optim.lr=2e-4"))
    assert json.loads(run.config.read_text())["settings"]["optim"]["lr"] == 2e-4


@pytest.mark.parametrize(("state", "code"), [("done", 0), ("requeue", 75), ("refused", 78)])
def test_an_outcome_becomes_the_exit_code_of_the_contract(tmp_path, state, code):
    run = RunDirectory(tmp_path)
    run.start_attempt(0)
    run.end_attempt(Outcome(state, "why", 5))
    assert run.exit_code() == code
    assert run.attempts() == [{"first_step": 0, "last_step": 5}]


def test_a_killed_attempt_leaves_no_outcome_of_an_earlier_one(tmp_path):
    run = RunDirectory(tmp_path)
    run.start_attempt(0)
    run.end_attempt(Outcome("requeue", "why", 5))
    run.accept(settings())
    assert run.outcome() is None
    assert run.exit_code() == 70


def test_a_start_that_is_refused_leaves_the_outcome_as_it_was(tmp_path):
    run = RunDirectory(tmp_path)
    run.accept(settings("optim.lr=1e-4"))
    (run.checkpoints / "step-00000010").mkdir(parents=True)
    run.end_attempt(Outcome("done", "all steps are done", 10))
    with pytest.raises(RunError):
        run.accept(settings("optim.lr=2e-4"))
    assert run.outcome().state == "done"


def test_where_nothing_can_be_written_every_rank_tells_why_it_refuses(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("ccmdist.cluster.run_directory.commit_json", full)
    assert RunDirectory(tmp_path).refuse("the reason")


def test_three_attempts_without_a_step_stop_asking(tmp_path):
    run = RunDirectory(tmp_path)
    states = []
    for first, last in ((0, 4), (4, 4), (4, 4), (4, 4)):
        run.start_attempt(first)
        states.append(run.end_attempt(Outcome("requeue", "stopped by SIGUSR2", last)).state)
    assert states == ["requeue", "requeue", "requeue", "refused"]
    assert "3 attempts in a row ended at step 4" in run.outcome().reason


def test_killed_attempts_that_committed_something_count_as_progress(tmp_path):
    run = RunDirectory(tmp_path)
    for first in (0, 4, 8):
        run.start_attempt(first)
    assert run.end_attempt(Outcome("requeue", "stopped by SIGUSR2", 8)).state == "requeue"


def test_only_the_first_refusal_is_told(tmp_path):
    run = RunDirectory(tmp_path)
    run.start_attempt(3)
    assert run.refuse("first")
    assert not run.refuse("second")
    assert run.outcome() == Outcome("refused", "first", 3)
    assert not list(Path(tmp_path).glob(".*tmp*"))


def test_paths_are_inside_the_run(tmp_path):
    run = RunDirectory(tmp_path)
    assert all(
        os.path.commonpath([tmp_path, p]) == str(tmp_path) for p in (run.checkpoints, run.tensorboard, run.adapter)
    )
