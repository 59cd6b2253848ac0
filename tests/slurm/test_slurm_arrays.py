"""Array jobs on a real Slurm: workers that are killed or stopped come back alone, and the bytes are the same."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.distributed.small_world import IMAGE_SIZE_PX, data_overrides
from tests.slurm.small_cluster import ROOT, task_pid
from tests.unit.jobs.small_run import make_run

pytestmark = pytest.mark.slurm

NUM_WORKERS = 4
DRAWN = r"batch \d+: "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("arrays")


def ccmdist(*words):
    done = subprocess.run(
        [sys.executable, "-m", "ccmdist", *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def contents(folder, pattern):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


@pytest.fixture(scope="module")
def synthetic(cluster, project, world, place):
    """A synthetic set of four workers, of whom one was killed and one was stopped; its array's id and folder."""
    out = place / "synthetic"
    words = [*data_overrides(world), f"out={out}", "images_per_mask=8", "batch_size=2", "batches_per_shard=4"]
    words += ["denoise_steps=16", "guidance_scale=1"]
    job = project.sbatch(f"--array=0-{NUM_WORKERS - 1}", "slurm/synthesize.sh", "configs/synthesize/tiny.yaml", *words)
    project.wait_for_line(f"{job}_1", DRAWN)
    os.kill(task_pid(job, SLURM_ARRAY_TASK_ID=1), signal.SIGKILL)
    project.wait_for_line(f"{job}_2", DRAWN)
    cluster.run("scancel", "--signal=USR2", f"{job}_2")
    for task in (1, 2):
        cluster.wait_until_back(f"{job}_{task}", 0)
    cluster.wait_for(job, "COMPLETED")
    return job, out, words


@pytest.mark.timeout(900)
def test_a_set_whose_workers_were_killed_and_stopped_has_no_gap_and_no_duplicate(synthetic):
    assert "images of plan" in ccmdist("shards", "verify", synthetic[1], "--plan")


def test_only_the_workers_that_were_hit_started_again(cluster, project, synthetic):
    job = synthetic[0]
    assert [cluster.restarts(f"{job}_{task}") for task in range(NUM_WORKERS)] == [0, 1, 1, 0]
    killed, stopped = project.log(f"{job}_1"), project.log(f"{job}_2")
    assert "a task ended with 137; it starts again by itself" in killed, killed
    assert "stopped with its work committed; it starts again by itself" in stopped, stopped
    folders = list((synthetic[1] / "jobs").iterdir())
    assert [folder.name for folder in folders] == [job]
    assert [len(json.loads((folders[0] / f"starts-{task}.json").read_text())) for task in range(4)] == [1, 2, 2, 1]


def test_the_bytes_are_those_of_a_single_worker(synthetic, place):
    alone = place / "alone"
    ccmdist("synthesize", "configs/synthesize/tiny.yaml", *synthetic[2], f"out={alone}")
    assert len(contents(alone, "*.tar")) > NUM_WORKERS
    assert contents(synthetic[1], "*.tar") == contents(alone, "*.tar")
    assert contents(synthetic[1], "*.json") == contents(alone, "*.json")


def test_an_array_fills_the_cache_with_the_bytes_of_a_single_worker(cluster, project, world, place):
    words = [*data_overrides(world), f"data.cache={place}/cache"]
    job = project.sbatch("--array=0-2", "slurm/precompute.sh", "configs/precompute/tiny.yaml", *words)
    cluster.wait_for(job, "COMPLETED")
    (found,) = (place / "cache").glob("[0-9a-f]*")
    alone = world / "cache" / found.name  # beside it lie those that other tests have filled
    assert contents(found, "*") == contents(alone, "*") != {}


def test_an_array_measures_and_a_job_that_depends_on_it_reports(cluster, project, world, synthetic, place):
    words = [f"real={world}/shards", f"synthetic.wdlora={synthetic[1]}", f"out={place}/report"]
    script = ["slurm/evaluate.sh", "configs/evaluate/tiny.yaml", *words]
    measure = project.sbatch("--array=0-1", *script)
    after = [f"--dependency=afterok:{measure}", "--kill-on-invalid-dep=yes"]
    report = project.sbatch(*after, *script)
    cluster.wait_for(measure, "COMPLETED")
    assert not (place / "report" / "report.json").exists()
    cluster.wait_for(report, "COMPLETED")
    assert json.loads((place / "report" / "report.json").read_text())["synthetic"].keys() == {"wdlora"}


def test_an_array_of_low_priority_chooses_a_checkpoint_and_one_that_is_stopped_comes_back(
    cluster, project, world, place
):
    runs = [make_run(place / name, world, {1: 0.1, 2: 0.2, 3: 0.3}, size_px=IMAGE_SIZE_PX) for name in ("run", "alone")]
    words = ["configs/select/tiny.yaml", "images_per_mask=8", "batch_size=4", "denoise_steps=16", "guidance_scale=1"]
    job = project.sbatch("--array=0-1", "slurm/select.sh", *words, f"run={runs[0]}")
    assert "Nice=1000" in cluster.run("scontrol", "show", "job", f"{job}_0")
    project.wait_for_line(f"{job}_1", DRAWN)
    cluster.run("scancel", "--signal=USR2", f"{job}_1")
    cluster.wait_until_back(f"{job}_1", 0)
    cluster.wait_for(job, "COMPLETED")
    assert re.search(r"select: stopped with \d of 3 checkpoints drawn and measured", project.log(f"{job}_1"))
    ccmdist("select", *words, f"run={runs[1]}")
    found, expected = ((run / "best.json", run / "selection" / "selection.json") for run in runs)
    assert [path.read_bytes() for path in found] == [path.read_bytes() for path in expected]


def test_what_waits_for_a_job_that_was_refused_is_cancelled(cluster, project, world, place):
    bad = project.sbatch("slurm/evaluate.sh", "configs/evaluate/tiny.yaml", "alpha=2", f"out={place}/none")
    after = [f"--dependency=afterok:{bad}", "--kill-on-invalid-dep=yes"]
    waiting = project.sbatch(*after, "slurm/evaluate.sh", "configs/evaluate/tiny.yaml", f"out={place}/none")
    cluster.wait_for(bad, "FAILED")
    cluster.wait_for(waiting, "CANCELLED")
