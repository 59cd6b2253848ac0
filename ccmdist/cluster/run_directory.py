"""The folder of a run: where its parts lie, who holds it, and how its last attempt ended.

runs/NAME/
  config.json       the resolved settings, with their digest
  outcome.json      how the last attempt ended: done, requeue or refused, and why
  attempts.json     first and last step of every attempt
  checkpoints/      step-00001000/ ...
  tensorboard/      event files
  adapter/          the exported adapter of a finished run
  network/          instead, the exported network of one that trained from scratch
  ledger.jsonl      what the time of every attempt was spent on
  owner.json        host, process and job that hold the lock
  selection/        what `ccmdist select` drew with each checkpoint, and measured
  best.json         which checkpoint it chose
"""

import json
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import filelock

from ccmdist.cluster.ranks import job_from_environment
from ccmdist.commit import commit_json, make_folder, temporary_name
from ccmdist.config.loading import differences, digest, resolved
from ccmdist.config.settings import Settings
from ccmdist.console import log
from ccmdist.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_REFUSED, EXIT_REQUEUE, RunError

State = Literal["done", "requeue", "refused"]
MAX_ATTEMPTS_WITHOUT_PROGRESS = 3
CHECKPOINTS: Final = "checkpoints"
COMMITTED: Final = re.compile(r"step-(\d{8})")
"""Name of a checkpoint's folder, once it is committed."""
LOST_NODE_S: Final = 300.0
"""How long a file server may keep the lock of a node that it no longer hears of; the lease of NFS 4 is 90 s."""
EXIT_CODES: dict[str, int] = {"done": EXIT_DONE, "requeue": EXIT_REQUEUE, "refused": EXIT_REFUSED}


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. Whoever started the ranks turns it into an exit code and, if asked, requeues."""

    state: State
    reason: str
    step: int

    @property
    def exit_code(self) -> int:
        """0, 75 or 78."""
        return EXIT_CODES[self.state]


class RunDirectory:
    """Paths and bookkeeping of one run. Only rank 0 calls what writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        self.tensorboard = path / "tensorboard"
        self.adapter = path / "adapter"
        self.network = path / "network"
        self.config = path / "config.json"
        self.ledger = path / "ledger.jsonl"
        self._lock = filelock.FileLock(path / ".lock", timeout=0)

    def trained(self, what: Literal["adapter", "network"]) -> Path:
        """Where a finished run leaves what it has trained."""
        return self.adapter if what == "adapter" else self.network

    def hold(self) -> None:
        """Take the run for this process until it ends, however it ends.

        On a file system without locks a killed holder on another node leaves its lock behind; the error names it.
        A lock of an earlier start of the same Slurm job is waited for: its node may have been lost with it.

        Raises:
            RunError: If another live process holds it, or the folder cannot be written.
        """
        try:
            make_folder(self.path)
            self._acquire()
        except filelock.Timeout:
            raise RunError(
                f"{self.path}: is in use by {self._owner()}",
                "wait for it to end, stop it, or choose another run folder; "
                f"if it is gone for certain, remove {self._lock.lock_file}",
            ) from None
        except OSError as error:
            raise RunError(f"{self.path}: {error.strerror}", "choose a run folder that you may write to") from None
        job = job_from_environment()
        job_of_owner = {"job": job.job_id if job else "", "restart": job.restart_count if job else 0}
        commit_json(self.path / "owner.json", {"host": socket.gethostname(), "pid": os.getpid()} | job_of_owner)

    def _acquire(self) -> None:
        try:
            self._lock.acquire()
        except filelock.Timeout:
            job, owner = job_from_environment(), self.owner()
            if job is None or owner.get("job") != job.job_id or owner.get("restart", 0) >= job.restart_count:
                raise
            log.warning("%s: waits for the lock of an earlier start of this job, %s", self.path, self._owner())
            self._lock.acquire(timeout=LOST_NODE_S, poll_interval=1.0)

    def release(self) -> None:
        """Let others take the run."""
        self._lock.release()

    def owner(self) -> dict[str, Any]:
        """Host, pid and job of the process that took the run last, which may be gone; empty before the first."""
        return _read(self.path / "owner.json") or {}

    def _owner(self) -> str:
        owner = self.owner()
        job = f" of job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid', '?')}{job} on {owner.get('host', 'an unknown host')}"

    def accept(self, config: Settings, allowed_changes: frozenset[str] = frozenset()) -> None:
        """Write the settings of a new run, or check that those of an old one have not changed; forget its outcome.

        A run that has committed nothing yet has nothing that other settings could contradict.

        Raises:
            RunError: If a field that decides what is computed differs and is not in ``allowed_changes``.
        """
        values = resolved(config)
        before = _read(self.config)
        if before is not None and any(self.checkpoints.glob("step-*")):
            changed = differences(before["settings"], values, type(config))
            if refused := {name: change for name, change in changed.items() if name not in allowed_changes}:
                lines = "".join(f"\n  {name}: {change}" for name, change in refused.items())
                advice = "choose another run folder, or restore the settings"
                if "objective.kind" not in refused:  # else other parameters are trained: no checkpoint fits
                    flags = " ".join(f"--allow-change {name}" for name in refused)
                    advice = f"choose another run folder, restore the settings, or accept the change with {flags}"
                raise RunError(f"{self.path}: this run was started with other settings:{lines}\n{advice}")
        commit_json(self.config, {"digest": digest(config), "settings": values})
        (self.path / "outcome.json").unlink(missing_ok=True)

    def settings(self) -> dict[str, Any]:
        """The resolved settings of the run's last start.

        Raises:
            OSError: If there are none, or they may not be read.
            ValueError: If what is there is not what a run writes.
        """
        try:
            return dict(json.loads(self.config.read_text())["settings"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.config}: holds no settings") from error

    def committed_step(self) -> int:
        """Step of the newest checkpoint by its name, whether or not it verifies; 0 if there is none."""
        return max((step_of(path) for path in committed_paths(self.checkpoints)), default=0)

    def start_attempt(self, step: int) -> int:
        """Note that an attempt begins at ``step``; its number, from 0."""
        attempts = self.attempts()
        commit_json(self.path / "attempts.json", [*attempts, {"first_step": step, "last_step": step}])
        return len(attempts)

    def attempts(self) -> list[dict[str, int]]:
        """First and last step of every attempt so far."""
        return _read(self.path / "attempts.json") or []

    def end_attempt(self, outcome: Outcome) -> Outcome:
        """Write how the attempt ended; the outcome that stands.

        A run that asks three times in a row to be started again without a new step stops asking.
        """
        attempts = self.attempts()
        if attempts:
            attempts[-1]["last_step"] = outcome.step
            commit_json(self.path / "attempts.json", attempts)
        last = attempts[-MAX_ATTEMPTS_WITHOUT_PROGRESS:]
        # A killed attempt writes no last step; what it committed shows in where the next one begins.
        stuck = len(last) == MAX_ATTEMPTS_WITHOUT_PROGRESS and {a["first_step"] for a in last} == {outcome.step}
        if outcome.state == "requeue" and stuck:
            reason = (
                f"{outcome.reason}: {len(last)} attempts in a row ended at step {outcome.step} without a new one; "
                "give the job more time, or a signal that comes later"
            )
            outcome = Outcome("refused", reason, outcome.step)
        commit_json(
            self.path / "outcome.json", {"state": outcome.state, "reason": outcome.reason, "step": outcome.step}
        )
        return outcome

    def refuse(self, reason: str) -> bool:
        """Write that the run cannot go on, unless another rank already has; whether it is this rank's to tell.

        Where the disk takes nothing any more, every rank tells it.
        """
        try:
            return self._refuse(reason)
        except OSError:
            return True

    def _refuse(self, reason: str) -> bool:
        attempts = self.attempts()
        values = {"state": "refused", "reason": reason, "step": attempts[-1]["last_step"] if attempts else 0}
        temporary = temporary_name(self.path / "outcome.json")
        commit_json(temporary, values)
        try:
            os.link(temporary, self.path / "outcome.json")
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def outcome(self) -> Outcome | None:
        """How the last attempt ended; None while it runs or when it was killed."""
        values = _read(self.path / "outcome.json")
        return Outcome(**values) if values else None

    def exit_code(self) -> int:
        """The exit code of the contract: 0 done, 75 run me again, 78 refused, 70 anything else."""
        outcome = self.outcome()
        return outcome.exit_code if outcome else EXIT_INTERNAL


def committed_paths(folder: Path) -> list[Path]:
    """All committed checkpoint folders, oldest first, whether or not they verify."""
    return sorted(path for path in folder.glob("step-*") if COMMITTED.fullmatch(path.name)) if folder.is_dir() else []


def step_of(checkpoint: Path) -> int:
    """Optimizer steps that a committed checkpoint has seen, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def _read(path: Path) -> Any:
    """The JSON in ``path``, or None if there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
