"""Freezing what a Slurm job runs, and counting its starts. Imports no torch: a batch script waits for both.

A job may wait for days and be started again for weeks. It always runs the code and the settings that were there when
it was first started, whatever has been edited or checked out since.
"""

import importlib
import importlib.metadata
import itertools
import json
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import ccmdist
from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.ranks import job_from_environment
from ccmdist.cluster.run_directory import MAX_ATTEMPTS_WITHOUT_PROGRESS, RunDirectory
from ccmdist.commit import commit_json, sync_file, sync_folder, temporary_name
from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import read_resolved, resolved
from ccmdist.config.select import SelectConfig
from ccmdist.config.settings import Settings
from ccmdist.config.stages import STAGES, result_folder
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import FINGERPRINT
from ccmdist.errors import CcmdistError, RunError
from ccmdist.evaluation.stored import num_stored

PACKAGES: Final = ("torch", "deepspeed", "diffusers", "transformers", "peft", "safetensors", "numpy")
"""Whose versions decide what a job computes."""
PACKAGE: Final = Path(ccmdist.__file__).resolve().parent
SCRIPTS: Final = "slurm"


def snapshot(stage: str, config: Settings, arguments: Sequence[str]) -> Path:
    """Freeze the code and the settings of a job in a folder beside its results; that folder, as an absolute path.

    Tasks of one Slurm job share one folder, whoever of them comes first. Without a job around, every call makes one.

    Args:
        stage: A name in ``STAGES``.
        config: Its settings.
        arguments: From which the settings were made; kept for people to read, never run.

    Raises:
        RunError: If the scripts that start jobs are not to be found, or the code could not be run from that folder.
    """
    jobs = result_folder(config).absolute() / "jobs"
    if ":" in str(jobs):
        # PYTHONPATH would be parted there, and Python would run other code than the frozen one.
        raise RunError(f"{jobs}: Python finds no code in a folder whose path holds a colon", "choose another folder")
    about = {"stage": stage, "arguments": list(arguments)}
    name = _job_name()
    for number in itertools.count():
        job = JobFolder(jobs / (f"{name}-{number}" if number else name))
        if _make(job, config, about) or (_in_job() and _is_same(job, config, about)):
            return job.path
    raise AssertionError("a free name is found at last")


def begin(folder: Path) -> None:
    """Count a start of a job, and forget how its last one ended.

    Raises:
        RunError: If the last starts, each ended without an outcome, have brought nothing new; or there is no job here.
    """
    job = JobFolder(folder)
    config = _settings(job)
    task = job_from_environment()
    counted = job.starts(task.array_task if task else "")
    starts = [*_read(counted, []), _progress(config)]
    commit_json(counted, starts)
    job.outcome.unlink(missing_ok=True)
    last = starts[-MAX_ATTEMPTS_WITHOUT_PROGRESS - 1 :]
    if len(last) > MAX_ATTEMPTS_WITHOUT_PROGRESS and len(set(last)) == 1 and not _is_finished(config):
        # Not written to the outcome: the other tasks of an array share it, and go on.
        raise RunError(
            f"{folder}: the last {MAX_ATTEMPTS_WITHOUT_PROGRESS} starts of this job ended without anything new "
            f"committed (still {last[-1]} {UNITS[type(config)]})",
            "read the end of its log, mend the cause, and submit the job again",
        )


UNITS: dict[type[Settings], str] = {
    TrainConfig: "steps",
    PrecomputeConfig: "shards",
    SynthesizeConfig: "batches",
    EvaluateConfig: "units of work",
    SelectConfig: "drawn batches and measured shards",
}


def _progress(config: Settings) -> int:
    """What the stage has committed so far; grows with every commit."""
    if isinstance(config, TrainConfig):
        return RunDirectory(config.run).committed_step()
    if isinstance(config, PrecomputeConfig):
        return sum(index.name != FINGERPRINT for index in config.data.cache.glob("*/*.json"))
    if isinstance(config, SynthesizeConfig):
        return _drawn_batches(config.out, config.batches_per_shard)
    if isinstance(config, SelectConfig):
        drawn = sum(_drawn_batches(folder, config.batches_per_shard) for folder in config.folder.glob("step-*"))
        return drawn + num_stored(config.folder)
    assert isinstance(config, EvaluateConfig), "every stage is named"
    return num_stored(config.out)


def _drawn_batches(out: Path, batches_per_shard: int) -> int:
    return len(list(out.glob("*.tar"))) * batches_per_shard + len(list((out / "batches").glob("*.tar")))


def _is_finished(config: Settings) -> bool:
    """Whether the stage has nothing left to do: then it ends by itself with 0."""
    if isinstance(config, TrainConfig):
        return RunDirectory(config.run).committed_step() >= config.num_steps
    stage = next(name for name, kind in STAGES.items() if isinstance(config, kind))
    try:
        return importlib.import_module(f"ccmdist.jobs.{stage}").open_units(config) == 0
    except CcmdistError:
        return False


def _in_job() -> bool:
    return job_from_environment() is not None


def _job_name() -> str:
    job = job_from_environment()
    return job.job_id if job else time.strftime("%Y%m%d-%H%M%S")


def _make(job: JobFolder, config: Settings, about: dict[str, Any]) -> bool:
    """Make the folder, complete or not at all; False if there is one of this name."""
    if job.path.exists():
        return False
    temporary = JobFolder(temporary_name(job.path))
    try:
        _copy_code(temporary.code)
        commit_json(temporary.config, resolved(config))
        commit_json(temporary.about, about | _versions())
        temporary.path.rename(job.path)
    except OSError:
        # Another task of the job was faster: a folder is not renamed onto one that holds something.
        if not job.path.exists():
            raise
        return False
    finally:
        shutil.rmtree(temporary.path, ignore_errors=True)
    sync_folder(job.path.parent)
    return True


def _is_same(job: JobFolder, config: Settings, about: dict[str, Any]) -> bool:
    """Whether the folder was made for this stage with these settings; several may start from one allocation."""
    found = _read(job.about, {})
    return all(found.get(name) == value for name, value in about.items()) and _read(job.config, {}) == resolved(config)


def _copy_code(code: Path) -> None:
    """Copy the package and the scripts that start its tasks, and flush both to the disk."""
    # The folder's content is compared with nothing, so caches of the interpreter would only be litter.
    ignored = shutil.ignore_patterns("__pycache__", "logs", ".*")
    shutil.copytree(PACKAGE, code / PACKAGE.name, ignore=ignored)
    shutil.copytree(_scripts(), code / SCRIPTS, ignore=ignored)
    for path in code.rglob("*"):
        if path.is_file():
            sync_file(path)


def _scripts() -> Path:
    for folder in (Path(SCRIPTS), PACKAGE.parent / SCRIPTS):
        if (folder / "job.sh").is_file():
            return folder
    raise RunError(f"job: there is no {SCRIPTS}/job.sh in {Path.cwd()}", "submit jobs from a clone of the project")


def _versions() -> dict[str, Any]:
    """What besides the settings decides the result, as far as it can be named."""
    found = {name: _version(name) for name in PACKAGES}
    revision, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return {
        "versions": {"python": platform.python_version(), "ccmdist": ccmdist.__version__, **found},
        "git": {"revision": revision.strip(), "changed": bool(changes.strip())} if revision else None,
    }


def _version(package: str) -> str:
    """Of an installed package; some sites build PyTorch without saying."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*words: str) -> str:
    """What git says of the code, or nothing where there is no git or no clone."""
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _settings(job: JobFolder) -> Settings:
    about = _read(job.about, {})
    if about.get("stage") not in STAGES or not job.config.is_file():
        raise RunError(f"{job.path}: is not the folder of a job", "name one that `ccmdist job snapshot` printed")
    return read_resolved(STAGES[about["stage"]], job.config)


def _read(path: Path, default: Any) -> Any:
    """The JSON in ``path``; ``default`` if there is none that can be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return default
