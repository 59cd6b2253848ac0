"""A stage becomes as many array tasks as it has work, jobs wait for each other, and all can be looked at before."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.config.select import SelectConfig
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.errors import RunError
from ccmdist.jobs import launching
from ccmdist.jobs.launching import (
    carry_out,
    evaluate_jobs,
    precompute_jobs,
    select_jobs,
    synthesize_jobs,
    train_jobs,
)

ROOT = Path(__file__).parents[3]
DATA = ["data.shards=shards/a", "data.model=models/a"]
HEAVY = ("torch", "deepspeed", "diffusers", "transformers", "peft", "accelerate", "datasets")


@pytest.fixture
def open_units(monkeypatch):
    """Say how many units a stage has open."""

    def say(number):
        for stage in ("precompute", "synthesize", "evaluate", "select"):
            monkeypatch.setattr(importlib.import_module(f"ccmdist.jobs.{stage}"), "open_units", lambda config: number)

    return say


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """Stands for Slurm and for what freezes a job; what was submitted. A job of the name "refused" is refused."""
    submitted = []

    def submit(job, work):
        if job.slurm.job_name == "refused":
            raise RunError("sbatch refused the job: invalid partition")
        submitted.append((job, work))
        return str(100 + len(submitted))

    monkeypatch.setattr(launching, "submit", submit)
    monkeypatch.setattr(launching, "refuse_without_slurm", lambda: None)
    monkeypatch.setattr(launching, "snapshot", lambda stage, config, arguments: tmp_path / f"{stage} {len(submitted)}")
    return submitted


def synthesize_config(out="synthetic/a"):
    return load(SynthesizeConfig, [], [f"out={out}", *DATA])


def train_config(run="runs/a"):
    return load(TrainConfig, [], [f"run={run}", *DATA])


@pytest.mark.parametrize(
    ("number", "settings", "tasks", "why"),
    [
        (5, {}, 5, "5 batches to draw, 1 worker in each array task"),
        (5, {"gpus_per_node": 4}, 2, "5 batches to draw, 4 workers in each array task"),
        (8, {"gpus_per_node": 4, "nodes": 2}, 1, "8 batches to draw, 8 workers in each array task"),
        (100, {"max_array_tasks": 3}, 3, "100 batches to draw, 1 worker in each array task, but max_array_tasks is 3"),
        (0, {}, 0, "0 batches to draw, 1 worker in each array task"),
    ],
)
def test_an_array_is_as_large_as_the_work(open_units, number, settings, tasks, why):
    open_units(number)
    (request,) = synthesize_jobs(synthesize_config(), SlurmSettings(**settings))
    assert (request.num_array_tasks, request.why) == (tasks, why)


def test_where_nothing_is_left_nothing_is_submitted(open_units, slurm):
    open_units(0)
    requests = precompute_jobs(load(PrecomputeConfig, [], DATA), SlurmSettings())
    assert list(carry_out(requests, [], is_dry_run=False)) == [
        "precompute: 0 shards to encode, 1 worker in each array task; no job is needed"
    ]
    assert not slurm


def test_an_evaluation_measures_in_an_array_without_gpus_and_reports_in_one_process(open_units, slurm):
    open_units(7)
    config = load(EvaluateConfig, [], ["out=reports/a", "real=shards/a", "synthetic.x=synthetic/x"])
    measure, report = evaluate_jobs(config, SlurmSettings(tasks_per_node=2, max_array_tasks=3))
    assert (measure.num_array_tasks, measure.slurm.num_gpus_per_node, measure.slurm.num_tasks_per_node) == (3, 0, 2)
    assert (report.num_array_tasks, report.slurm.num_gpus_per_node, report.slurm.num_tasks_per_node) == (1, 0, 1)
    list(carry_out([measure, report], [], is_dry_run=False))
    assert [job.after for job, _ in slurm] == [(), ("101",)]
    open_units(1)
    (report,) = evaluate_jobs(config, SlurmSettings())
    assert report.why.endswith("1 worker in each array task: one process measures and writes the report")
    open_units(0)
    measure, report = evaluate_jobs(config, SlurmSettings())
    assert (measure.num_array_tasks, report.num_array_tasks) == (0, 1)


def test_a_choice_of_a_checkpoint_waits_behind_other_jobs(open_units, tmp_path):
    open_units(3)
    config = load(SelectConfig, [], [f"run={tmp_path}/run"])
    (request,) = select_jobs(config, SlurmSettings())
    text, _ = carry_out([request], [], is_dry_run=True)
    assert text.startswith("select: 3 array tasks of 1 node x 1 process with a GPU each; 3 checkpoints to draw with, 1")
    assert "#SBATCH --nice=1000\n" in text
    assert str(tmp_path / "run" / "selection" / "jobs") in text
    (request,) = select_jobs(config, SlurmSettings(nice=0))
    assert "--nice" not in "".join(carry_out([request], [], is_dry_run=True))


def test_an_evaluation_asks_for_gpus_where_networks_run_and_its_report_does_not(open_units):
    words = ["out=reports/a", "real=shards/a", "synthetic.x=synthetic/x"]
    for more in ("downstream.num_folds=2", "extractors.dinov2=models/dinov2"):
        open_units(8)
        config = load(EvaluateConfig, [], [*words, more])
        measure, report = evaluate_jobs(config, SlurmSettings())
        assert (measure.num_array_tasks, measure.slurm.num_gpus_per_node, report.slurm.num_gpus_per_node) == (8, 1, 0)
        assert evaluate_jobs(config, SlurmSettings(gpus_per_node=0))[0].slurm.num_gpus_per_node == 0
        open_units(1)
        (alone,) = evaluate_jobs(config, SlurmSettings())
        assert alone.slurm.num_gpus_per_node == 1


def test_a_job_that_is_not_needed_is_not_waited_for(open_units, slurm):
    open_units(0)
    requests = [*precompute_jobs(load(PrecomputeConfig, [], DATA), SlurmSettings())]
    list(carry_out([*requests, *train_jobs(train_config(), SlurmSettings())], [], is_dry_run=False))
    assert [job.after for job, _ in slurm] == [()]


def test_what_was_submitted_is_told_with_the_commands_to_follow_and_to_cancel_it(slurm, tmp_path):
    requests = train_jobs(
        train_config("runs/my run"), SlurmSettings(nodes=2, gpus_per_node=8), ("--allow-change=seed",)
    )
    (told,) = carry_out(requests, ["a.yaml"], is_dry_run=False)
    log = tmp_path / "train 0" / "submitit" / "101_0_log.out"
    assert told.splitlines() == [
        "train: job 101, 2 nodes x 8 processes with a GPU each; 1000 steps",
        f"  folder  {tmp_path}/train 0",
        f"  log     {log}",
        f"  watch   squeue --job 101; tail -F '{log}'; ccmdist status 'runs/my run' --watch",
        "  cancel  scancel 101",
    ]
    job, work = slurm[0]
    assert job.is_collective
    assert (work.stage, work.folder, work.options) == ("train", f"{tmp_path}/train 0", ("--allow-change=seed",))


def test_a_refusal_in_the_middle_names_what_was_submitted_before(open_units, slurm):
    open_units(3)
    requests = [
        *train_jobs(train_config(), SlurmSettings()),
        *synthesize_jobs(synthesize_config(), SlurmSettings(job_name="refused")),
    ]
    with pytest.raises(RunError) as problem:
        list(carry_out(requests, [], is_dry_run=False))
    assert str(problem.value) == (
        "sbatch refused the job: invalid partition; submitted before it: 101, which `scancel` ends"
    )


def test_a_dry_run_shows_every_batch_file_and_does_nothing(open_units, slurm, tmp_path):
    open_units(3)
    requests = [
        *train_jobs(train_config(tmp_path / "run"), SlurmSettings()),
        *synthesize_jobs(synthesize_config(tmp_path / "out"), SlurmSettings()),
    ]
    first, second, last = carry_out(requests, [], is_dry_run=True)
    assert first.startswith("train: 1 node x 1 process with a GPU each; 1000 steps\n\n#!/bin/bash\n")
    assert second.startswith("synthesize: 3 array tasks of 1 node x 1 process with a GPU each; 3 batches to draw")
    assert "#SBATCH --dependency=afterok:JOB_1\n" in second
    assert last == "dry run: nothing was done"
    assert not slurm
    assert not list(tmp_path.iterdir())


def launch(script, *words, cwd=ROOT):
    """A launcher in a process that ends with 99 if it has imported anything heavy; there is no Slurm."""
    code = (
        "import runpy, sys\nsys.argv = sys.argv[1:]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        f"finally:\n    [sys.exit(99) for name in {HEAVY!r} if name in sys.modules]"
    )
    command = [sys.executable, "-c", code, str(ROOT / "launch" / script), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, env={"PATH": "/nowhere"})


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "launch").glob("*.py")))
def test_help_of_a_launcher_ends_with_an_example_of_existing_configs(script):
    done = launch(script, "--help")
    assert done.returncode == 0, done.stderr
    example = re.search(r"Example: python (.*)$", done.stdout.strip()).group(1)
    path, *words = shlex.split(example)
    assert path == f"launch/{script}"
    files = [word.rpartition("=")[2] for word in words if word.endswith(".yaml")]
    assert files
    assert all((ROOT / file).is_file() for file in files)
    assert len((ROOT / "launch" / script).read_text().splitlines()) <= 80


def test_a_launcher_tells_a_mistake_in_one_line_and_ends_with_78(tmp_path):
    done = launch("train.py", "run=x", *DATA, "slurm.node=2", cwd=tmp_path)
    assert done.returncode == 78
    assert done.stderr == (
        "ccmdist: TrainConfig and its slurm section from the command line:\n"
        "  slurm.node: no such field; did you mean 'nodes'?\n"
    )


def test_what_the_stage_would_refuse_is_refused_before_it_waits_in_the_queue(tmp_path):
    done = launch("train.py", "run=x", *DATA, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("ccmdist: models/a")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_a_launcher_needs_neither_slurm_nor_torch(tmp_path):
    drawn = tmp_path / "drawn"
    shutil.copytree(ROOT / "shards" / "demo", drawn)
    commit_manifest(drawn, "synthetic", read_manifest(drawn).shards)
    words = ["out=report", f"real={ROOT}/shards/demo", "synthetic.demo=drawn", "memorisation=null", "slurm.qos=long"]
    done = launch("evaluate.py", *words, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("real: ")
    assert "8 array tasks of 1 node x 1 process; 8 units of work open" in done.stdout
    assert done.stdout.count("#SBATCH --qos=long\n") == 2
    assert done.stdout.endswith("dry run: nothing was done\n")
    done = launch("evaluate.py", *words, cwd=tmp_path)
    assert done.returncode == 78
    assert done.stderr.startswith("ccmdist: sbatch: not found on this machine; submit on a node of the cluster")
    assert list(tmp_path.iterdir()) == [drawn]


def test_every_word_of_a_submission_is_kept_for_people_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "submit", lambda job, work: "7")
    monkeypatch.setattr(launching, "refuse_without_slurm", lambda: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_JOB_ID", "99")  # of an interactive job around the launcher
    words = [f"run={tmp_path}/run", *DATA]
    (told,) = carry_out(train_jobs(load(TrainConfig, [], words), SlurmSettings()), words, is_dry_run=False)
    folder = Path(re.search(r"folder  (.*)", told).group(1))
    kept = json.loads((folder / "job.json").read_text())
    assert (kept["stage"], kept["arguments"]) == ("train", words)
    assert "99" not in folder.name.split("-")[0]
    assert (folder / "code" / "slurm" / "job.sh").is_file()
