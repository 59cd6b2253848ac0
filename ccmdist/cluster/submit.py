"""From settings to a batch job: the text of its batch file, and its submission through Submitit.

Submitit writes the file, pickles the work and calls sbatch. Everything that is its own here is what the text says:
the snapshot's slurm/job.sh prepares the tasks and, at the end, decides whether the job comes back.
"""

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.ranks import LAUNCHER_VARIABLES
from ccmdist.config.slurm import SlurmSettings
from ccmdist.errors import ConfigError, RunError

SUBMITIT_FOLDER: Final = "submitit"
"""In a job's folder, for its owner alone: pickles, batch file and logs."""
MAX_TIMEOUTS: Final = 1_000_000
"""Submitit counts time limits when its own handler takes a signal; how often a job may come back is not its to say."""


SAID_BY_THE_FILE: Final = frozenset(
    f"SBATCH_{name}"
    for name in (
        *("ARRAY_INX", "CPUS_PER_GPU", "CPUS_PER_TASK", "ERROR", "GPUS", "GPUS_PER_NODE", "GPUS_PER_TASK", "GRES"),
        *("JOB_NAME", "NO_REQUEUE", "NTASKS", "NTASKS_PER_NODE", "OPEN_MODE", "OUTPUT", "REQUEUE", "SIGNAL"),
        *("TIMELIMIT", "WAIT"),
    )
)
"""Variables that sbatch would obey instead of the lines of the batch file."""
DEFAULTS: Final = ("partition", "account", "qos", "constraint", "reservation")
"""Settings that may be left to such a variable: slurm/env.sh sets the first two."""


@dataclass(frozen=True)
class BatchJob:
    """One job, or one array of jobs.

    Attributes:
        stage: Name of the stage; also the job's name unless the settings give one.
        folder: Where its snapshot, settings and logs lie.
        slurm: What it asks for.
        num_array_tasks: 1 for a job that is no array.
        is_collective: Whether its processes need each other, so that all end when one ends badly.
        after: Ids of jobs that must have ended well before this one starts; if one fails, this one is cancelled.
    """

    stage: str
    folder: JobFolder
    slurm: SlurmSettings
    num_array_tasks: int = 1
    is_collective: bool = False
    after: tuple[str, ...] = ()

    def log(self, job_id: str) -> Path:
        """Log of the first process (of the first array task); the others' lie beside it. Kept over all restarts."""
        task = "" if self.num_array_tasks == 1 else "_0"
        return self.folder.path / SUBMITIT_FOLDER / f"{job_id}{task}_0_log.out"


def batch_text(job: BatchJob) -> str:
    """The batch file that :func:`submit` would hand to sbatch; needs no Slurm.

    Raises:
        ConfigError: If the job's folder has a path that cannot stand in a batch file.
    """
    from submitit.slurm.slurm import _make_sbatch_string

    folder = _submitit_folder(job)
    command = f"{_PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = _parameters(job)
    if job.num_array_tasks > 1:
        parameters["map_count"] = job.num_array_tasks
    text: str = _make_sbatch_string(command=command, folder=folder, **parameters)
    return text


def submit(job: BatchJob, work: Callable[[], None]) -> str:
    """Hand the job to Slurm; its id.

    Args:
        job: Whose folder holds the snapshot already.
        work: What each process runs, from the snapshot's code; pickled.

    Raises:
        ConfigError: As :func:`batch_text`.
        RunError: If there is no Slurm here, or it refuses the job.
    """
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError

    refuse_without_slurm()
    folder = _submitit_folder(job)
    folder.mkdir(mode=0o700, exist_ok=True)
    with outside_of_any_job(), _as_the_file_says(job.slurm):
        # One executor per job: a parameter that was set once cannot be unset.
        executor = SlurmExecutor(folder, max_num_timeout=MAX_TIMEOUTS, python=_PYTHON)
        executor.update_parameters(**_parameters(job))
        try:
            first = executor.submit_array([work] * job.num_array_tasks)[0]
        except FailedJobError as error:
            told = " ".join(str(error).split("stderr:")[-1].split())
            raise RunError(f"sbatch refused the job: {told}", "see `sinfo` and the slurm settings") from None
    return first.job_id.split("_")[0]


def refuse_without_slurm() -> None:
    """Refuse to submit where nothing can be submitted.

    Raises:
        RunError: If there is no Slurm here.
    """
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise RunError("sbatch: not found on this machine", "submit on a node of the cluster, or look with --dry-run")


def _parameters(job: BatchJob) -> dict[str, Any]:
    slurm = job.slurm
    return {
        "job_name": slurm.job_name or f"ccmdist-{job.stage}",
        "time": slurm.time_limit_min,
        "nodes": slurm.nodes,
        "ntasks_per_node": slurm.num_tasks_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": _gpus(slurm),
        "mem": None if slurm.mem_gb is None else f"{slurm.mem_gb}G",
        "signal_delay_s": slurm.signal_lead_s,
        **{name: getattr(slurm, name) or None for name in _OPTIONAL},
        "wckey": None,  # submitit's own, which clusters that check such keys refuse
        "stderr_to_stdout": True,
        "array_parallelism": job.num_array_tasks,
        "setup": _setup(job),
        "teardown": ["conclude $?"],
        # Since Slurm 22.05 srun does not take the cores of a task from the job.
        "srun_args": [
            "--open-mode=append",
            f"--cpus-per-task={slurm.cpus_per_task}",
            f"--kill-on-bad-exit={int(job.is_collective)}",
            "--wait=0",
        ],
        "additional_parameters": _additional(job),
    }


_OPTIONAL: Final = ("partition", "account", "qos", "constraint", "exclude", "comment")


def _gpus(slurm: SlurmSettings) -> str | None:
    if not slurm.num_gpus_per_node:
        return None
    return f"{slurm.gpu_type}:{slurm.num_gpus_per_node}" if slurm.gpu_type else str(slurm.num_gpus_per_node)


def _additional(job: BatchJob) -> dict[str, Any]:
    found: dict[str, Any] = {"requeue": True}
    if job.slurm.reservation:
        found["reservation"] = job.slurm.reservation
    if job.slurm.nice:
        found["nice"] = job.slurm.nice
    if job.after:
        # Without the second, a job whose predecessor failed would wait for ever.
        found |= {"dependency": f"afterok:{':'.join(job.after)}", "kill-on-invalid-dep": "yes"}
    return found


def _setup(job: BatchJob) -> list[str]:
    return [
        f"SCRIPTS={shlex.quote(str(_path(job) / 'code' / 'slurm'))}",
        # The interpreter that submits is the one that runs, unless slurm/env.sh names a container or another one.
        f"export CCMDIST_VENV=${{CCMDIST_VENV:-{shlex.quote(sys.prefix)}}}",
        'source "$SCRIPTS/job.sh" || exit 70',
        f"begin_frozen_job {job.stage} {shlex.quote(str(_path(job)))}",
    ]


# slurm/job.sh has set PYTHONPATH to the snapshot, and PYTHONSAFEPATH: with -m, Python would look into the working
# folder first, where a clone holds later code.
_PYTHON: Final = '"${CCMDIST_PREFIX[@]}" python3'


def _path(job: BatchJob) -> Path:
    path = job.folder.path.absolute()
    if not str(path).isprintable() or any(character in str(path) for character in "%\\"):
        raise ConfigError(
            f"{str(path)!r}: cannot stand in a batch file, where % and \\ have a meaning and a line ends at a newline",
            "choose a folder whose path is of other characters; spaces, quotes and letters of any language will do",
        )
    return path


def _submitit_folder(job: BatchJob) -> Path:
    return _path(job) / SUBMITIT_FOLDER


@contextlib.contextmanager
def outside_of_any_job() -> Iterator[None]:
    """Hide what an interactive job around this process has set, which the new job would inherit as its own."""
    names = [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_")) and name != "SLURM_CONF"]
    with _hidden([*names, *LAUNCHER_VARIABLES]):
        yield


def _as_the_file_says(slurm: SlurmSettings) -> contextlib.AbstractContextManager[None]:
    """Hide variables that would win over the batch file; what the settings leave open is for them to say."""
    given = {f"SBATCH_{name.upper()}" for name in DEFAULTS if getattr(slurm, name)}
    return _hidden(SAID_BY_THE_FILE | given)


@contextlib.contextmanager
def _hidden(names: Iterable[str]) -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)
