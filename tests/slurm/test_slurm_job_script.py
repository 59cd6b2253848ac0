"""How slurm/job.sh ends a job, on a real Slurm, with tasks that only wait for a signal."""

import json

import pytest

pytestmark = pytest.mark.slurm

BATCH = """#!/bin/bash
set -euo pipefail
. slurm/job.sh
STAGE=train AS_SUBMITTED="sbatch slurm/train.sh again" OPTIONS=() JOB_LINK=slurm/logs/none.job
CCMDIST_JOB=$PWD/jobs/$1 CCMDIST_PREFIX=(bash "$PWD/task.sh")
trap : USR1 USR2 TERM
say "start $((${SLURM_RESTART_COUNT:-0} + 1))"
[ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
code=0
run_tasks 1 || code=$?
conclude "$code"
"""
TASK = """trap 'sleep 1; exit ${CODE:-75}' USR2 TERM
echo waiting
while :; do sleep 0.1; done
"""


@pytest.fixture
def begin(cluster, project):
    """Submit a job whose task waits; the job's id when it does. It ends with 0 when it is started again."""
    (project.folder / "batch.sh").write_text(BATCH)
    (project.folder / "task.sh").write_text(TASK)

    def submit(name, *options, outcome=None, **environment):
        folder = project.folder / "jobs" / name
        folder.mkdir(parents=True)
        if outcome:
            (folder / "outcome.json").write_text(json.dumps(outcome, indent=2))
        words = ("--requeue", "--open-mode=append", "--output=slurm/logs/short-%j.out", *options, "batch.sh", name)
        job = project.sbatch(*words, **environment)
        project.wait_for_line(job, "waiting")
        return job

    return submit


def ended(cluster, project, job, state, code, restarts=0):
    """The log of a job that has ended like this."""
    cluster.wait_for(job, state)
    assert (cluster.exit_code(job), cluster.restarts(job)) == (code, restarts)
    return project.log(job)


def test_tasks_that_stop_on_a_signal_are_put_back(cluster, project, begin):
    job = begin("signal")
    cluster.run("scancel", "--signal=USR2", job)
    log = ended(cluster, project, job, "COMPLETED", 0, restarts=1)
    assert "stopped with its work committed; it starts again by itself" in log
    assert ": start 2" in log


def test_a_signal_to_the_script_alone_is_handed_on(cluster, project, begin):
    job = begin("handed-on")
    cluster.run("scancel", "--batch", "--signal=USR2", job)
    assert "it starts again by itself" in ended(cluster, project, job, "COMPLETED", 0, restarts=1)


def test_a_cancelled_job_stays_cancelled_and_tells_how_to_go_on(cluster, project, begin):
    job = begin("cancelled")
    cluster.run("scancel", job)
    log = ended(cluster, project, job, "CANCELLED", 75)
    assert "stopped with its work committed; the job was cancelled; to go on:" in log
    assert "sbatch slurm/train.sh again" in log


@pytest.mark.drill
def test_a_job_whose_time_is_up_is_put_back(cluster, project, begin):
    job = begin("time-limit", "--time=1")
    log = ended(cluster, project, job, "COMPLETED", 0, restarts=1)
    assert "DUE TO TIME LIMIT" in log
    assert "stopped with its work committed; it starts again by itself" in log


def test_a_job_that_slurm_has_put_back_is_left_to_it(cluster, project, begin):
    job = begin("put-back")
    cluster.run("scontrol", "requeue", job)
    assert "Slurm has put the job back" in ended(cluster, project, job, "COMPLETED", 0, restarts=1)


def test_where_no_job_may_be_put_back_the_command_is_told(cluster, project, begin):
    job = begin("forbidden", "--no-requeue")
    cluster.run("scancel", "--signal=USR2", job)
    log = ended(cluster, project, job, "FAILED", 75)
    assert "but cannot be put back into the queue (" in log
    assert "to go on:" in log
    assert "sbatch slurm/train.sh again" in log


def test_a_task_that_crashes_is_started_again(cluster, project, begin):
    job = begin("crash", CODE="3")
    cluster.run("scancel", "--signal=USR2", job)
    assert "a task ended with 3; it starts again by itself" in ended(cluster, project, job, "COMPLETED", 0, restarts=1)


def test_what_was_refused_is_not_started_again(cluster, project, begin):
    job = begin("refused", CODE="78")
    cluster.run("scancel", "--signal=USR2", job)
    assert "refused; the lines above say why" in ended(cluster, project, job, "FAILED", 78)


@pytest.mark.parametrize(
    ("state", "ends", "code", "restarts"),
    [("requeue", "COMPLETED", 0, 1), ("refused", "FAILED", 78, 0), ("done", "COMPLETED", 0, 0)],
)
def test_the_outcome_that_the_first_rank_wrote_decides(cluster, project, begin, state, ends, code, restarts):
    outcome = {"reason": 'a text\n  "state": "nonsense"', "state": state, "step": 3}
    job = begin(f"outcome-{state}", outcome=outcome, CODE="0")
    cluster.run("scancel", "--signal=USR2", job)
    ended(cluster, project, job, ends, code, restarts)
