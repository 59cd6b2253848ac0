"""A job runs what was there when it was first started, and stops asking when its starts bring nothing new."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ccmdist
from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.run_directory import MAX_ATTEMPTS_WITHOUT_PROGRESS
from ccmdist.config.loading import load, resolved
from ccmdist.config.stages import STAGES
from ccmdist.errors import RunError
from ccmdist.evaluation.stored import FOLDERS
from ccmdist.jobs.job import begin, snapshot

ROOT = Path(__file__).parents[3]
OVERRIDES = {
    "train": ["run={out}", "data.shards=s", "data.model=m", "num_steps=4"],
    "precompute": ["data.cache={out}", "data.shards=s", "data.model=m"],
    "synthesize": ["out={out}", "data.shards=s", "data.model=m", "batches_per_shard=3"],
    "evaluate": ["out={out}", "real=s", "synthetic.a=x"],
    "select": ["out={out}", "run=r"],
}


@pytest.fixture(autouse=True)
def in_a_clone_and_in_no_job(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)


def settings(stage, out, *more):
    return load(STAGES[stage], [], [text.format(out=out) for text in OVERRIDES[stage]] + list(more))


def make(stage, out):
    return snapshot(stage, settings(stage, out), [])


def test_the_frozen_code_runs_by_itself_with_the_frozen_settings(tmp_path):
    config = settings("train", tmp_path / "run")
    folder = snapshot("train", config, ["configs/train/tiny.yaml"])
    job = JobFolder(folder)
    assert folder.parent == tmp_path / "run" / "jobs"
    assert json.loads(job.config.read_text()) == resolved(config)
    program = "import ccmdist.cli; print(ccmdist.__file__)"
    environment = os.environ | {"PYTHONPATH": str(job.code), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(job.code / "ccmdist" / "__init__.py")
    assert (job.code / "slurm" / "job.sh").read_bytes() == (ROOT / "slurm" / "job.sh").read_bytes()
    assert os.access(job.code / "slurm" / "train.sh", os.X_OK)


def test_nothing_of_an_interpreter_or_of_older_jobs_is_frozen(tmp_path):
    code = JobFolder(make("evaluate", tmp_path)).code
    names = {path.name for path in code.rglob("*")}
    assert "__pycache__" not in names
    assert "logs" not in names
    assert [path.name for path in tmp_path.joinpath("jobs").iterdir()] == [code.parent.name], "a temporary folder"


def test_a_job_says_what_it_was_made_from(tmp_path):
    arguments = ["a b.yaml", "run='x'; touch marker", "note=two\nlines $(touch marker)"]
    folder = snapshot("train", settings("train", tmp_path), arguments)
    about = json.loads(JobFolder(folder).about.read_text())
    assert about["stage"] == "train"
    assert about["arguments"] == arguments
    assert about["versions"]["ccmdist"] == ccmdist.__version__
    assert {"torch", "deepspeed", "diffusers", "python"} <= about["versions"].keys()
    assert about["git"] is None or len(about["git"]["revision"]) == 40
    assert not list(tmp_path.rglob("marker"))
    assert not (ROOT / "marker").exists()


def test_tasks_of_one_job_that_come_at_once_share_one_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    with ThreadPoolExecutor(6) as pool:
        found = set(pool.map(lambda _: make("synthesize", tmp_path), range(6)))
    assert found == {tmp_path / "jobs" / "77"}
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["77"]


def test_other_settings_in_one_job_get_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    first = make("train", tmp_path)
    second = snapshot("train", settings("train", tmp_path, "seed=1"), [])
    assert [first.name, second.name] == ["78", "78-1"]
    assert make("train", tmp_path) == first


def test_without_a_job_every_submission_is_frozen_anew(tmp_path):
    assert len({make("precompute", tmp_path) for _ in range(3)}) == 3


def test_a_folder_in_which_python_would_not_find_the_frozen_code_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"a:b/jobs: Python finds no code in a folder whose path holds a colon; choose"):
        make("train", tmp_path / "a:b")
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_scripts_the_place_to_be_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("ccmdist.jobs.job.PACKAGE", tmp_path / "ccmdist")
    (tmp_path / "ccmdist").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"there is no slurm/job\.sh in .*; submit jobs from a clone of the project"):
        make("train", tmp_path / "run")
    assert list((tmp_path / "run" / "jobs").iterdir()) == []


def commit_something(stage, out, number):
    """What a stage leaves when it commits."""
    path = {
        "train": out / "checkpoints" / f"step-{number:08d}" / "manifest.json",
        "precompute": out / "0123456789abcdef" / f"train-{number:06d}.json",
        "synthesize": out / "batches" / f"test-{number:06d}.tar",
        "evaluate": out / FOLDERS[number % len(FOLDERS)] / f"real-{number}.safetensors",
        "select": out / f"step-{number:08d}" / "batches" / "val-000000.tar",
    }[stage]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")


@pytest.mark.parametrize("stage", STAGES)
def test_after_three_starts_that_brought_nothing_new_a_job_is_not_started_again(tmp_path, stage):
    folder = make(stage, tmp_path)
    begin(folder)
    commit_something(stage, tmp_path, 1)
    for _ in range(MAX_ATTEMPTS_WITHOUT_PROGRESS):
        begin(folder)
    with pytest.raises(RunError, match=r"the last 3 starts of this job ended without anything new committed"):
        begin(folder)
    assert not JobFolder(folder).outcome.exists(), "other tasks of an array would take it for theirs"
    commit_something(stage, tmp_path, 2)
    begin(folder)


def test_a_start_forgets_how_the_last_one_ended(tmp_path):
    folder = make("train", tmp_path)
    JobFolder(folder).outcome.write_text('{"state": "requeue"}')
    begin(folder)
    assert not JobFolder(folder).outcome.exists()


def test_an_assembled_shard_counts_as_its_batches(tmp_path):
    folder = make("synthesize", tmp_path)
    for number in range(3):
        commit_something("synthesize", tmp_path, number)
    begin(folder)
    (tmp_path / "test-000000.tar").touch()
    for number in range(3):
        (tmp_path / "batches" / f"test-{number:06d}.tar").unlink()
    begin(folder)
    assert json.loads(JobFolder(folder).starts("").read_text()) == [3, 3]


def test_array_tasks_count_their_own_starts(tmp_path, monkeypatch):
    folder = make("synthesize", tmp_path)
    for task in ("0", "1", "2", "3", "4"):
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        begin(folder)
    assert json.loads(JobFolder(folder).starts("4").read_text()) == [0]


def test_a_finished_run_may_be_started_as_often_as_one_likes(tmp_path):
    folder = make("train", tmp_path)
    commit_something("train", tmp_path, 4)
    for _ in range(6):
        begin(folder)


def test_a_folder_that_is_no_job_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not the folder of a job; name one that `ccmdist job snapshot` printed"):
        begin(tmp_path)


def test_the_batch_script_tells_settings_from_options():
    program = '. slurm/job.sh; split_options "$@"; printf "%s\\n" "${SETTINGS[@]}" -- "${OPTIONS[@]}"'
    words = ["a b.yaml", "run=x y", "--allow-change", "num_steps", "--allow-change=seed", "note='; touch marker"]
    environment = os.environ | {"SLURM_JOB_ID": "1"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", program, "_", *words], env=environment, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "a b.yaml",
        "run=x y",
        "note='; touch marker",
        "--",
        "--allow-change",
        "num_steps",
        "--allow-change=seed",
    ]
