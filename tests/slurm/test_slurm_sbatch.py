"""Training by `sbatch slurm/train.sh` on a real Slurm: stopped in every way, it ends where the undisturbed run ends."""

import re
import shlex
import sys

import pytest
import safetensors.torch
import torch

from ccmdist.cluster.run_directory import RunDirectory
from tests.distributed.small_world import losses, weights
from tests.slurm.small_cluster import LENGTH, NUM_STEPS, TWO_BY_TWO

pytestmark = pytest.mark.slurm

BEGUN = "training adapter: "


def preempt(cluster, project, job):
    """Let a job of higher priority take the nodes."""
    project.preempt(job)


def signal(cluster, project, job):
    """Send what Slurm sends when the time is nearly up."""
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_until_back(job, cluster.restarts(job))


def put_back(cluster, project, job):
    """Put the job back by hand, as an administrator does."""
    restarts = cluster.restarts(job)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_until_back(job, restarts)


def cut_power(cluster, project, job):
    """Lose the node on which the batch script runs."""
    node, restarts = cluster.batch_node(job), cluster.restarts(job)
    cluster.cut_power(node)
    cluster.wait_until_back(job, restarts)
    cluster.restore_power(node)


def adapter(run):
    """Tensors of the exported adapter."""
    return safetensors.torch.load_file(run / "adapter" / "pytorch_lora_weights.safetensors")


STOPS = (preempt, signal, put_back, cut_power)


@pytest.fixture(scope="module")
def stopped(cluster, project, world):
    """Folder and job of a run that was stopped in every way."""
    folder = project.folder / "runs" / "stopped"
    job = project.train(world, folder, *LENGTH, shape=TWO_BY_TWO)
    for number, stop in enumerate(STOPS, 1):
        project.wait_for_line(job, BEGUN, number)
        begun = len(re.findall("step .*/", project.log(job)))
        project.wait_for_line(job, r"step \d+/", begun + 3)
        stop(cluster, project, job)
    cluster.wait_for(job, "COMPLETED")
    return folder, job


@pytest.mark.timeout(1200)
def test_a_run_that_was_stopped_in_every_way_ends_bitwise_like_the_undisturbed_one(straight, stopped):
    expected, found = weights(straight), weights(stopped[0])
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name
    expected, found = adapter(straight), adapter(stopped[0])
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_only_a_lost_node_costs_steps(stopped):
    attempts = RunDirectory(stopped[0]).attempts()
    assert len(attempts) == len(STOPS) + 1
    for stop, before, after in zip(STOPS, attempts, attempts[1:], strict=False):
        if stop is not cut_power:
            assert before["last_step"] > before["first_step"], stop
            assert after["first_step"] == before["last_step"], stop
    assert attempts[-1]["last_step"] == NUM_STEPS


def test_the_curve_has_no_gap_and_no_overlap(straight, stopped):
    assert [step for step, _ in losses(straight)] == list(range(1, NUM_STEPS + 1))
    assert losses(stopped[0]) == losses(straight)
    assert losses(stopped[0], "held_out/mean") == losses(straight, "held_out/mean")


def test_one_log_tells_every_start_and_every_end(project, stopped):
    log = project.log(stopped[1])
    starts = re.findall(r": start (\d+) on ", log)
    # A start on a node that has just come back may be one more.
    assert len(starts) > len(STOPS)
    assert starts == [str(number) for number in range(1, len(starts) + 1)]
    assert "stopped by SIGUSR2" in log
    assert log.count("stopped with its work committed; it starts again by itself") == 2
    assert log.count("stopped with its work committed; Slurm has put the job back") == 1
    assert log.rstrip().endswith(": done")
    steps = [int(step) for step in re.findall(r"step (\d+)/", log)]
    assert sorted(set(steps)) == list(range(1, NUM_STEPS + 1))


def test_a_second_job_on_a_run_is_refused_and_names_the_first(cluster, project, world, tmp_path):
    hold = (
        f"import time; from pathlib import Path; from ccmdist.cluster.run_directory import RunDirectory\n"
        f"run = RunDirectory(Path({str(tmp_path)!r})); run.hold(); print('held', flush=True); time.sleep(200)"
    )
    script = tmp_path / "first.sh"
    script.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(hold)}\n")
    first = project.sbatch("--output=slurm/logs/first-%j.out", script)
    project.wait_for_line(first, "held")
    second = project.train(world, tmp_path)
    cluster.wait_for(second, "FAILED")
    cluster.run("scancel", first)
    assert cluster.exit_code(second) == 78
    assert re.search(rf"is in use by process \d+ of job {first} on n\d; wait for it to end", project.log(second))
    assert cluster.restarts(second) == 0


def test_a_run_that_always_dies_is_started_three_times(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path / "run", CCMDIST_FAULT="sigkill@step:rank=0,step=0")
    for restarts in range(3):
        cluster.wait_until_back(job, restarts)
    cluster.wait_for(job, "FAILED")
    assert cluster.exit_code(job) == 78
    assert cluster.restarts(job) == 3
    assert project.log(job).count("a task ended with 137; it starts again by itself") == 3
    assert "the last 3 starts of this job ended without anything new committed (still 0 steps)" in project.log(job)


def test_a_bad_config_ends_the_job_at_once(cluster, project, world, tmp_path):
    job = project.train(world, tmp_path / "run", "optim.lr=fast")
    cluster.wait_for(job, "FAILED")
    assert cluster.exit_code(job) == 78
    assert "optim.lr: should be a valid number" in project.log(job)
    assert not (tmp_path / "run").exists()
