"""All that can be known of where a run or a synthetic set stands, gathered in one value; only reads."""

import json
import os
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Final, Literal

from ccmdist.cluster.ledger import read_ledger
from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.data.manifest import MANIFEST
from ccmdist.diagnostics import liveness
from ccmdist.diagnostics.goodput import Attempt, Goodput, attempts_of, goodput
from ccmdist.diagnostics.liveness import SlurmJob, State, known, modified
from ccmdist.errors import RunError
from ccmdist.synthesis.output import BATCHES, SyntheticSet
from ccmdist.synthesis.plan import PLAN, read_plan

FORMAT: Final = 1
RECENT_S: Final = 600.0
"""Age of a synthetic set's newest batch up to which somebody is taken to draw the next."""


@dataclass(frozen=True)
class Standing:
    """Where a run or a set stands; the keys of ``ccmdist status --json``. None stands for what is not known.

    Attributes:
        format: Raised when a key changes its meaning; keys are only ever added.
        kind: What the folder holds.
        run: The folder, as given.
        state: See :class:`ccmdist.diagnostics.liveness.Life`.
        detail: One sentence on the state.
        step: Where it is; of a run that does not run, where it goes on. Of a set, batches that are committed.
        num_steps: Where it ends.
        committed_step: Newest commit.
        committed_age_s: Seconds since that commit.
        commit_every_steps: The run's setting.
        quiet_s: Seconds since its last sign of life.
        seconds_left: At the present pace, without saves that fail, queues and restarts.
        holder: Host, pid and job of the process that took the run last.
        slurm: What Slurm says of that job; None where it cannot be asked.
        last_exit: How the last attempt ended; None while one runs and after a kill.
        attempts: Every start.
        attempts_without_progress: Starts at the end of that list that are over and committed nothing.
        goodput: What the time was spent on.
    """

    kind: Literal["training run", "synthetic set"]
    run: str
    state: State
    detail: str
    step: int | None
    num_steps: int | None
    committed_step: int | None = None
    committed_age_s: float | None = None
    commit_every_steps: int | None = None
    quiet_s: float | None = None
    seconds_left: float | None = None
    holder: dict[str, Any] | None = None
    slurm: SlurmJob | None = None
    last_exit: Outcome | None = None
    attempts: list[Attempt] = field(default_factory=list)
    attempts_without_progress: int = 0
    goodput: Goodput | None = None
    format: int = FORMAT


def standing(folder: Path) -> Standing:
    """Where the run or the synthetic set in ``folder`` stands.

    Raises:
        RunError: If the folder holds neither, or may not be read.
        ShardError: If the plan of a synthetic set cannot be read.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: there is no such folder", "name the folder of a run, `run` in its settings")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise RunError(f"{folder}: may not be read by you", "ask its owner for read permission")
    if (folder / PLAN).exists():
        return _of_set(folder)
    run = RunDirectory(folder)
    if _is_run(run):
        return _of_run(run)
    inside = next((parent for parent in list(folder.resolve().parents)[:3] if _is_run(RunDirectory(parent))), None)
    raise RunError(
        f"{folder}: is neither a training run nor a synthetic set",
        f"it lies inside the run {inside}: name that" if inside else "name the folder of a run, `run` in its settings",
    )


def _is_run(run: RunDirectory) -> bool:
    """Whether a run has begun in this folder, or was at least submitted."""
    if liveness.traces(run) or liveness.settings(run):
        return True
    return any(
        (known(partial(_read, about)) or {}).get("stage") == "train" for about in run.path.glob("jobs/*/job.json")
    )


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def _of_run(run: RunDirectory) -> Standing:
    events = known(lambda: read_ledger(run.ledger)) or []
    job = liveness.ask_slurm(liveness.job_of(run))
    last_event = max((event["time"] for event in events), default=None)
    quiet_s = _age(liveness.last_sign_of_life(run, last_event))
    life = liveness.life(run, job, quiet_s)
    # A holder that is younger than the ledger has written nothing there yet: what the ledger knows is over.
    has_begun = modified(run.ledger) >= modified(run.path / "owner.json")
    is_alive = life.state == "running" and has_begun
    attempts, figures = attempts_of(events, is_alive), goodput(events, is_alive)
    committed, settings = known(run.committed_step) or 0, liveness.settings(run)
    step = attempts[-1].last_step if attempts and is_alive else committed
    num_steps = settings.get("num_steps")
    every = settings.get("checkpoint", {}).get("every_steps")
    pace = figures.step_s if figures else None
    return Standing(
        kind="training run",
        run=str(run.path),
        state=life.state,
        detail=life.detail,
        step=step,
        num_steps=num_steps,
        committed_step=committed,
        committed_age_s=_age(modified(run.checkpoints / f"step-{committed:08d}") or None),
        commit_every_steps=every,
        quiet_s=quiet_s,
        seconds_left=None if pace is None or num_steps is None else pace * max(num_steps - step, 0),
        holder=known(run.owner) or None,
        slurm=job,
        last_exit=known(run.outcome),
        attempts=attempts,
        attempts_without_progress=_without_progress(attempts),
        goodput=figures,
    )


def _of_set(folder: Path) -> Standing:
    """Of a synthetic set; its steps are batches."""
    plan = read_plan(folder)
    done, wanted = SyntheticSet(folder, plan).num_committed(), len(plan.batches)
    job = liveness.ask_slurm(liveness.job_of(RunDirectory(folder)))
    quiet_s = _age(max(modified(folder), modified(folder / BATCHES)) or None)
    state: State = "waiting"
    detail = f"{wanted - done} of {wanted} batches are open; the same command, or an array of it, draws them"
    if (folder / MANIFEST).exists():
        state, detail = "done", f"{plan.num_images} images in {plan.num_shards} shards"
    elif (job and job.state in liveness.RUNS) or (quiet_s is not None and quiet_s < RECENT_S):
        state, detail = "running", str(job) if job else "the folder changed a moment ago"
    return Standing("synthetic set", str(folder), state, detail, done, wanted, quiet_s=quiet_s, slurm=job)


def _without_progress(attempts: list[Attempt]) -> int:
    """Attempts at the end of the list that are over and committed nothing."""
    ended = [attempt for attempt in reversed(attempts) if attempt.state != "running"]
    return len(list(takewhile(lambda attempt: not attempt.num_commits and attempt.state != "done", ended)))


def _age(moment: float | None) -> float | None:
    """Seconds since ``moment``; clocks of other nodes may run ahead."""
    return None if moment is None else max(time.time() - moment, 0.0)
