"""What takes longer than a test may: time limits, other clusters, containers, lost nodes; `make slurm-drill`."""

import os
import re
import shutil
import signal
import sys
from itertools import pairwise

import pytest
import torch

from ccmdist.cluster.ledger import read_ledger
from ccmdist.cluster.run_directory import RunDirectory
from tests.distributed.small_world import losses, weights
from tests.slurm.small_cluster import TWO_BY_TWO, Project, task_pid, until

pytestmark = [pytest.mark.slurm, pytest.mark.drill, pytest.mark.timeout(900)]

LONG = ("num_steps=100000", "checkpoint.every_steps=1000000", "validation.every_steps=1000000")
BEGUN = "training adapter: "


def comes_back(cluster, project, job, run):
    """Wait for the second start to train; nothing of the first was lost. Ends the job."""
    project.wait_for_line(job, BEGUN, 2)
    first, second = RunDirectory(run).attempts()
    cluster.run("scancel", job)
    assert first["last_step"] > 0
    assert second["first_step"] == first["last_step"]
    cluster.wait_for(job, "CANCELLED")


def test_the_signal_before_the_time_limit_loses_no_step(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, *LONG, options=["--time=3", "--signal=USR2@60"])
    cluster.wait_until_back(job, 0)
    assert "stopped by SIGUSR2" in project.log(job)
    comes_back(cluster, project, job, tmp_path)


def test_a_run_whose_time_is_up_ends_bitwise_like_one_that_had_enough(cluster, project, world, tmp_path):
    length = ("num_steps=400", "checkpoint.every_steps=1000000", "validation.every_steps=1000000")
    jobs = {
        name: project.train(world, tmp_path / name, *length, options=options)
        for name, options in {"enough": ["--time=60"], "short": ["--time=2", "--signal=USR2@60"]}.items()
    }
    while cluster.states(jobs["short"]) != ["COMPLETED"]:
        restarts = cluster.restarts(jobs["short"])
        until(
            lambda: cluster.restarts(jobs["short"]) > restarts or cluster.states(jobs["short"]) == ["COMPLETED"],  # noqa: B023
            "the short job to end or to be put back",
        )
    cluster.wait_for(jobs["enough"], "COMPLETED")
    attempts = RunDirectory(tmp_path / "short").attempts()
    assert len(attempts) > 1
    assert all(after["first_step"] == before["last_step"] for before, after in pairwise(attempts))
    expected, found = weights(tmp_path / "enough"), weights(tmp_path / "short")
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(tmp_path / "enough") == losses(tmp_path / "short")


def test_a_time_limit_without_a_signal_before_it_loses_no_step(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, *LONG, options=["--time=2", "--signal=CONT@1"])
    cluster.wait_until_back(job, 0)
    assert "stopped by SIGTERM" in project.log(job)
    comes_back(cluster, project, job, tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"USER_SIGNAL": 0}, "stopped by SIGTERM"),
        # Slurm puts the job back before it has ended; that ours comes too late is no error.
        ({"GRACE": 0}, "Slurm has put the job back, and it starts again by itself"),
    ],
    ids=["without-a-signal-of-its-own", "without-grace"],
)
def test_a_preemption_by_a_less_patient_cluster_loses_no_step(other_cluster, world, tmp_path, settings, told):
    cluster = other_cluster(**settings)
    project = Project(cluster, tmp_path)
    job = project.train(world, tmp_path / "run", *LONG)
    project.wait_for_line(job, r"step \d+/")
    project.preempt(job)
    assert told in project.log(job)
    comes_back(cluster, project, job, tmp_path / "run")


def test_a_cancelled_run_has_committed_its_last_step(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, *LONG)
    project.wait_for_line(job, r"step \d+/", 2)
    cluster.run("scancel", job)
    cluster.wait_for(job, "CANCELLED")
    assert RunDirectory(tmp_path).committed_step() >= 2
    assert f"sbatch slurm/train.sh configs/train/tiny.yaml run={tmp_path}" in project.log(job)


def test_a_node_that_falls_silent_is_found_out_and_the_run_goes_on(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, *LONG, "checkpoint.every_steps=2")
    project.wait_for_line(job, "checkpoint committed", 2)
    node = cluster.batch_node(job)
    cluster.sandbox("kill", node)
    cluster.wait_until_back(job, 0)
    project.wait_for_line(job, BEGUN, 2)
    cluster.sandbox("revive", node)
    assert RunDirectory(tmp_path).attempts()[1]["first_step"] >= 4
    cluster.run("scancel", job)


def test_a_rank_that_is_stopped_is_named_and_the_job_goes_on_without_a_lost_commit(cluster, project, world, tmp_path):
    words = ("checkpoint.every_steps=2", "timeouts.step_min=0.5", "timeouts.checkpoint_min=0.5", "timeouts.answer_s=5")
    job = project.train(world, tmp_path, *LONG, *words, shape=TWO_BY_TWO)
    project.wait_for_line(job, "checkpoint committed", 2)
    os.kill(task_pid(job, SLURM_PROCID=3), signal.SIGSTOP)
    cluster.wait_until_back(job, 0)
    assert "hang: rank 3 does not answer (stopped, dead or unreachable)" in project.log(job)
    assert "a task ended with 70; it starts again by itself" in project.log(job)
    project.wait_for_line(job, BEGUN, 2)
    cluster.run("scancel", job)
    commits = [event["step"] for event in read_ledger(RunDirectory(tmp_path).ledger) if event["event"] == "commit"]
    assert RunDirectory(tmp_path).attempts()[1]["first_step"] in commits


STAND_IN = """#!/bin/bash
# Stands in for apptainer, which Debian does not package: runs the command where Slurm's programs cannot be run.
[ "$1" = exec ] && [ "$2" = --nv ] && [ "$3" = --bind ] && [ "$5" = --pwd ] && [ "$7" = image.sif ] || exit 99
cd "$6" && shift 7
exec unshare --mount bash -c '
    for program in scontrol squeue sbatch srun; do mount --bind /dev/null "$(command -v "$program")" || exit 99; done
    if scontrol ping 2>/dev/null; then exit 99; fi
    exec "$@"' _ "$@"
"""


def test_tasks_in_a_container_without_slurm_are_put_back_by_the_script_outside(cluster, project, world, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apptainer").write_text(STAND_IN)
    (programs / "apptainer").chmod(0o755)
    path = f"{programs}:{sys.prefix}/bin:{cluster.environment['PATH']}"
    container = {"CCMDIST_CONTAINER": "image.sif", "CCMDIST_VENV": "/nowhere", "PATH": path}
    job = project.train(world, tmp_path / "run", *LONG, **container)
    project.wait_for_line(job, r"step \d+/")
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_until_back(job, 0)
    assert "it starts again by itself" in project.log(job)
    comes_back(cluster, project, job, tmp_path / "run")


def test_a_machine_without_the_environment_is_told_so(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, CCMDIST_VENV="nowhere")
    cluster.wait_for(job, "FAILED")
    assert cluster.exit_code(job) == 78
    assert "there is no virtual environment at nowhere; make one with `make install`" in project.log(job)
    job = project.train(world, tmp_path, CCMDIST_CONTAINER="image.sif")
    cluster.wait_for(job, "FAILED")
    assert re.search(r"there is no apptainer on n\d for CCMDIST_CONTAINER=image.sif", project.log(job))


def test_scripts_that_were_changed_meanwhile_do_not_change_a_job(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path, *LONG)
    project.wait_for_line(job, r"step \d+/")
    for name in ("job.sh", "env.sh"):
        shutil.move(project.folder / "slurm" / name, tmp_path / name)
    try:
        cluster.run("scancel", "--signal=USR2", job)
        cluster.wait_until_back(job, 0)
        comes_back(cluster, project, job, tmp_path)
    finally:
        for name in ("job.sh", "env.sh"):
            shutil.move(tmp_path / name, project.folder / "slurm" / name)


def test_a_place_without_the_scripts_is_refused_with_its_name(cluster, project, tmp_path):
    (tmp_path / "slurm" / "logs").mkdir(parents=True)
    script = project.folder / "slurm" / "train.sh"
    job = cluster.run("sbatch", "--parsable", str(script), cwd=tmp_path)
    cluster.wait_for(job, "FAILED")
    told = (tmp_path / "slurm" / "logs" / f"ccmdist-train-{job}.out").read_text()
    assert f"there is no slurm/job.sh in {os.path.realpath(tmp_path)}; submit from the clone of the project" in told
