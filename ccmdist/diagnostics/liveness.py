"""Whether a run lives, from what it leaves behind: its outcome, its holder, its Slurm job, its last sign of life.

The lock itself is never tried: a try that succeeds would, for that moment, refuse a run that is just starting.
"""

import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import psutil

from ccmdist.cluster.run_directory import RunDirectory

T = TypeVar("T")
State = Literal["new", "running", "waiting", "done", "refused", "killed"]

DEFAULT_QUIET_LIMIT_MIN: Final = 60.0
"""Silence after which a run that cannot be looked at is taken for dead, where its settings do not say."""
CLOCK_SKEW_S: Final = 300.0
"""Between a process's start and the time that a shared file system gives to what it writes."""
SQUEUE_TIMEOUT_S: Final = 10.0
WILL_RUN: Final = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "SUSPENDED"}
RUNS: Final = {"RUNNING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED"}


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of a job; the state is "GONE" when it has no such job or the job has ended."""

    job_id: str
    state: str
    reason: str = ""
    nodes: str = ""
    time_left: str = ""

    def __str__(self) -> str:
        if self.state == "GONE":
            return f"job {self.job_id} is not in the queue"
        told = [f"on {self.nodes}"] if self.nodes else []
        if self.state in RUNS and self.time_left not in ("", "UNLIMITED", "INVALID"):
            told.append(f"{self.time_left} left")
        if self.state in WILL_RUN and self.reason not in ("", "None"):
            told.append(f"({self.reason})")
        return " ".join([f"job {self.job_id}", self.state, *told])

    @property
    def what_next(self) -> str:
        """Of a job that waits: whether somebody has to do something."""
        is_held = "held" in self.reason.lower() or "HOLD" in self.state
        return f"{self}; `scontrol release {self.job_id}` lets it run" if is_held else f"{self}; it goes on by itself"


@dataclass(frozen=True)
class Life:
    """Where a run stands.

    Attributes:
        state: "new" never started; "running"; "waiting" stopped after a commit or about to be started again by Slurm;
            "done"; "refused" cannot go on as it is; "killed" ended without a word.
        detail: One sentence: what that means here, and what to do.
    """

    state: State
    detail: str


def life(run: RunDirectory, job: SlurmJob | None, quiet_s: float | None) -> Life:
    """Where ``run`` stands.

    Args:
        run: The run.
        job: What Slurm says of the job that holds or held it; None if nothing is known.
        quiet_s: Seconds since its last sign of life; None if it never gave one.
    """
    outcome = known(run.outcome)
    if outcome is not None and outcome.state != "requeue":
        return Life("done" if outcome.state == "done" else "refused", outcome.reason)
    if outcome is not None:
        return Life("waiting", _what_next(job))
    if quiet_s is None:
        return Life("new", str(job) if job else "it was never started")
    return _without_outcome(run, job, quiet_s)


def _without_outcome(run: RunDirectory, job: SlurmJob | None, quiet_s: float) -> Life:
    """Of a run that has begun and has not said how it ended."""
    owner = known(run.owner) or {}
    is_here = owner.get("host") == socket.gethostname()
    if is_here and _is_alive(owner.get("pid"), run.path / "owner.json"):
        return Life("running", _holder(owner, job))
    if job and job.state in WILL_RUN:
        return Life("waiting", f"its ranks were killed; {job.what_next}")
    if is_here and job and job.state in RUNS:
        return Life("waiting", f"its ranks have ended or do not run yet; {job}")
    if job and job.state in RUNS:
        return Life("running", _holder(owner, job))
    go_on = "run the same command again to go on from the last commit"
    if is_here or job:
        told = f", {job}" if job else ""
        return Life("killed", f"{_holder(owner, None)} ended without a word{told}; {go_on}")
    limit_s = quiet_limit_s(run)
    if quiet_s <= limit_s:
        return Life("running", _holder(owner, job))
    return Life("killed", f"{_holder(owner, job)} has been silent for longer than {limit_s / 60:.0f} min; {go_on}")


def quiet_limit_s(run: RunDirectory) -> float:
    """Seconds of silence that no live run keeps: the longest that its settings let anything take."""
    limits = settings(run).get("timeouts") or {}
    return 60 * max((limits[name] for name in limits if name.endswith("_min")), default=DEFAULT_QUIET_LIMIT_MIN)


def settings(run: RunDirectory) -> dict[str, Any]:
    """The resolved settings of the run's last start; empty when it has none that can be read."""
    return known(run.settings) or {}


def known(read: Callable[[], T]) -> T | None:
    """What ``read`` returns, or None when what it reads is not there, not whole, or not this user's to read."""
    try:
        return read()
    except (OSError, ValueError, TypeError, KeyError):
        return None


def job_of(run: RunDirectory) -> str:
    """Id of the Slurm job that holds or held the run, or that it was submitted as; "" without one."""
    if owner := known(run.owner):
        return str(owner.get("job") or "")
    folders = [path for path in known(lambda: list((run.path / "jobs").iterdir())) or [] if path.name.isdigit()]
    return max(folders, key=lambda path: int(path.name)).name if folders else ""


def ask_slurm(job_id: str) -> SlurmJob | None:
    """What Slurm says of a job; None without a job, where there is no squeue, or when it does not answer."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job_id) or not shutil.which("squeue"):
        return None
    command = ["squeue", "--noheader", f"--jobs={job_id}", "--format=%T|%r|%N|%L"]
    try:
        answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=SQUEUE_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    lines = [line.split("|") for line in answer.stdout.splitlines() if line.count("|") == 3]
    # Of an array there are several lines; one task that runs is more telling than those that wait.
    for states in (RUNS, WILL_RUN):
        if fields := next((fields for fields in lines if fields[0] in states), None):
            return SlurmJob(job_id, *fields)
    return SlurmJob(job_id, "GONE")


def last_sign_of_life(run: RunDirectory, last_event: float | None) -> float | None:
    """Unix seconds of the last thing that is known of a run; None if it was never started."""
    return max([last_event or 0.0, *map(modified, traces(run))]) or None


def traces(run: RunDirectory) -> list[Path]:
    """Files of a run that has begun."""
    paths = [run.path / "owner.json", run.path / "attempts.json", run.ledger]
    return [path for path in paths if path.exists()]


def modified(path: Path) -> float:
    """When a file or folder changed last, in Unix seconds; 0 if it is not there."""
    return known(lambda: path.stat().st_mtime) or 0.0


def _what_next(job: SlurmJob | None) -> str:
    if job is None or job.state == "GONE":
        return "run the same command again to go on"
    return job.what_next if job.state in WILL_RUN else f"{job}, between two attempts"


def _holder(owner: dict[str, Any], job: SlurmJob | None) -> str:
    process = f"process {owner.get('pid', '?')} on {owner.get('host', 'an unknown host')}"
    return f"{process}, {job}" if job else process


def _is_alive(pid: Any, owner_file: Path) -> bool:
    """Whether the process that wrote ``owner_file`` lives, and not another one that has its number now."""
    try:
        process = psutil.Process(int(pid))
        was_there = process.create_time() < owner_file.stat().st_mtime + CLOCK_SKEW_S
        return was_there and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError, ValueError, TypeError):
        return False
