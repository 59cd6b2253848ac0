"""The launchers on a real Slurm: what is signalled, killed or out of time comes back, and ends as if undisturbed."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.cluster.submit import BatchJob, submit
from ccmdist.config.slurm import SlurmSettings
from ccmdist.jobs.submitted import SubmittedStage
from tests.distributed.small_world import SETTINGS, data_overrides, losses, weights
from tests.slurm.small_cluster import LENGTH, NUM_STEPS, ROOT, until

pytestmark = pytest.mark.slurm

TRAIN = [*SETTINGS, *LENGTH]
CPUS = ["slurm.gpus_per_node=0", "slurm.cpus_per_task=1", "slurm.signal_lead_s=5"]
SUBMITITS_OWN = ("Caught signal", "Bypassing", "checkpoint method", "Requeued job")


@pytest.fixture
def place(tmp_path):
    """A working folder whose own code must never run: jobs run what was frozen."""
    (tmp_path / "ccmdist").mkdir()
    (tmp_path / "ccmdist" / "__init__.py").write_text("raise SystemExit('code of the working folder was run')\n")
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def launch(cluster, place):
    """Submit by a launcher; id and log of each job."""

    def run(script, *words):
        told = cluster.run(sys.executable, str(ROOT / "launch" / f"{script}.py"), *words, *CPUS, cwd=place)
        ids, logs = re.findall(r": job (\d+),", told), re.findall(r"^  log     (.*)$", told, re.MULTILINE)
        return list(zip(ids, map(Path, logs), strict=True))

    return run


def wait_for_text(log, text):
    until(lambda: log.exists() and text in log.read_text(), lambda: f"{text!r} in {log}:\n{said(log)}")


def said(log):
    return log.read_text() if log.exists() else ""


def same_run(first, second):
    """Whether two runs ended with the same adapter, to the bit, and the same curve."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert losses(first) == losses(second)


def test_a_signalled_run_comes_back_and_ends_as_one_that_sbatch_started(cluster, launch, world, place, straight):
    run = place / "it's $(touch MARKER) é"
    words = [f"run={run}", *data_overrides(world), *TRAIN, "slurm.nodes=2", "slurm.tasks_per_node=2"]
    ((job, log),) = launch(
        "train", f"{ROOT}/configs/train/tiny.yaml", *words, 'slurm.comment="it\'s #1; $(touch MARKER)"'
    )
    assert "Comment=it's #1; $(touch MARKER)" in cluster.run("scontrol", "show", "job", job)
    wait_for_text(log, f"step 2/{NUM_STEPS}")
    cluster.run("scancel", "--signal=USR2", job)
    cluster.wait_until_back(job, 0)
    cluster.wait_for(job, "COMPLETED")
    told = log.read_text()
    assert "stopped by SIGUSR2" in told
    assert not any(text in told for text in SUBMITITS_OWN), told
    assert told.count("Job completed successfully") == 1
    first, second = RunDirectory(run).attempts()
    assert first["last_step"] == second["first_step"] > 1, "the signal lost steps, or came too late"
    same_run(run, straight)
    assert not list(place.rglob("MARKER"))


@pytest.mark.drill
def test_a_run_whose_time_is_up_goes_on_in_the_next_one(cluster, launch, world, place):
    words = [f"run={place / 'run'}", *data_overrides(world), *TRAIN, "num_steps=10000", "slurm.tasks_per_node=2"]
    ((job, log),) = launch("train", *words, "slurm.time_limit_min=2")
    cluster.wait_until_back(job, 0)
    wait_for_text(log, "start 2 on ")
    until(lambda: log.read_text().count("training adapter") == 2, lambda: f"a second attempt:\n{log.read_text()}")
    cluster.run("scancel", job)
    first, second = RunDirectory(place / "run").attempts()
    assert first["last_step"] == second["first_step"] > 0
    assert not any(text in log.read_text() for text in SUBMITITS_OWN)


@pytest.mark.drill
@pytest.mark.timeout(1200)
def test_a_chain_ends_with_a_report_although_a_worker_is_killed(cluster, launch, world, place):
    out = place / "synthetic"
    (place / "precompute.yaml").write_text("{}\n")
    (place / "train.yaml").write_text(f"run: {place}/run\n")
    (place / "synthesize.yaml").write_text(
        f"out: {out}\nbatch_size: 1\nbatches_per_shard: 2\ndenoise_steps: 16\nguidance_scale: 1\nimages_per_mask: 8\n"
    )
    (place / "evaluate.yaml").write_text(
        f"out: {place}/report\nreal: {world}/shards\nsynthetic:\n  a: {out}\nnum_bootstrap: 100\n"
    )
    words = [
        *(f"{stage}={stage}.yaml" for stage in ("precompute", "train", "synthesize", "evaluate")),
        *data_overrides(world),
        f"data.cache={place}/cache",
        *(f"train.{word}" for word in TRAIN),
        "train.slurm.tasks_per_node=2",
    ]
    jobs = launch("pipeline", *words, "slurm.max_array_tasks=3")
    assert len(jobs) == 5
    drawing, log = jobs[2]
    wait_for_text(log.with_name(f"{drawing}_1_0_log.out"), "batch ")
    cluster.run("scancel", "--signal=KILL", f"{drawing}_1.0")
    cluster.wait_until_back(f"{drawing}_1", 0)
    for job, _ in jobs:
        cluster.wait_for(job, "COMPLETED")
    assert cluster.restarts(f"{drawing}_0") == 0, "an array task was started again that had not failed"
    assert (place / "report" / "report.html").is_file()
    cluster.run(sys.executable, "-m", "ccmdist", "shards", "verify", str(out), "--plan")


def test_a_stage_that_is_refused_cancels_those_after_it(cluster, place, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, cluster.environment[name])
    settings = SlurmSettings(gpus_per_node=0, cpus_per_task=1)
    first, second = (JobFolder(place / name) for name in ("first", "second"))
    for folder in (first, second):
        shutil.copytree(ROOT / "slurm", folder.code / "slurm", ignore=shutil.ignore_patterns("logs"))
        shutil.copytree(ROOT / "ccmdist", folder.code / "ccmdist", ignore=shutil.ignore_patterns("__pycache__"))
    one = BatchJob("train", first, settings)
    job = submit(one, SubmittedStage("train", str(first.path)))
    other = BatchJob("evaluate", second, settings, after=(job,))
    cancelled = submit(other, SubmittedStage("evaluate", str(second.path)))
    cluster.wait_for(job, "FAILED")
    cluster.wait_for(cancelled, "CANCELLED")
    assert cluster.exit_code(job) == 78
    assert "is not the folder of a job" in one.log(job).read_text()
