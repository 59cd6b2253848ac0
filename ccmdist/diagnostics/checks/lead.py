"""Times that were measured against those that are set: is there enough to commit, is a slow step taken for a hang."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ccmdist
from ccmdist.cluster.ledger import read_ledger
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.train import TrainConfig
from ccmdist.diagnostics.checks.finding import Finding, Findings, Request

SCRIPT: Final = Path("slurm/train.sh")
SIGNAL: Final = re.compile(r"^#SBATCH\s.*--signal=(?:\w+:)?\w+@(\d+)", re.MULTILINE)
SAVE_FACTOR: Final = 1.5
"""A save on a busy file system takes longer than those that were measured."""
SPARE_S: Final = 30.0
"""For ranks that notice the signal in different steps, and for the batch script to conclude."""
SLOWEST_FACTOR: Final = 5.0
"""Between what was measured and the time at which a rank counts as hung."""
IN_A_STEP: Final = ("data_wait", "compute")


@dataclass(frozen=True)
class Measured:
    """The longest of each, in seconds, over a run's ledger."""

    save_s: float
    step_s: float
    validation_s: float

    @property
    def needed_s(self) -> int:
        """Time that a stop needs, rounded up to 10 s: the step and validation it falls into, a save, and spare time."""
        total = self.step_s + self.validation_s + SAVE_FACTOR * self.save_s + SPARE_S
        return 10 * math.ceil(total / 10)


def check(request: Request, slurm: Mapping[str, str], graces: Mapping[str, int | None]) -> Findings:
    """Compare what is set with what was measured.

    Args:
        request: What was asked.
        slurm: The controller's settings.
        graces: Partition -> seconds between the signal and the end of a preempted job; None without preemption.
    """
    lead_s, source = planned(request)
    yield from _forced_exit(request, lead_s, source)
    measured = measured_of(request.config) if request.config else None
    if measured is None:
        if lead_s is not None:
            found = f"{lead_s} s ({source}); no save was measured yet, ask again after a run's first checkpoints"
            yield Finding("signal lead", "OK", found)
        return
    yield _lead(lead_s, source, measured)
    yield from _graces(graces, measured, slurm)


def timeouts(config: TrainConfig) -> Findings:
    """Compare the times at which a rank counts as hung with what the run took so far."""
    if (measured := measured_of(config)) is None:
        return
    taken = {"step": measured.step_s, "validation": measured.validation_s, "checkpoint": measured.save_s}
    allowed = {name: 60 * getattr(config.timeouts, f"{name}_min") for name in taken}
    short = [name for name in taken if allowed[name] < SLOWEST_FACTOR * taken[name]]
    told = ", ".join(f"{name} {taken[name]:.1f} of {allowed[name]:.0f} s" for name in taken)
    if short:
        numbers = {name: math.ceil(SLOWEST_FACTOR * taken[name] / 60) for name in short}
        setting = " ".join(f"timeouts.{name}_min={minutes}" for name, minutes in numbers.items())
        yield Finding("timeouts", "WARN", told, f"set {setting}: a slow one would be taken for a rank that hangs")
    else:
        yield Finding("timeouts", "OK", told)


def measured_of(config: TrainConfig) -> Measured | None:
    """What the run of these settings took so far; None before its first commit."""
    return measure(read_ledger(RunDirectory(config.run).ledger))


def planned(request: Request) -> tuple[int | None, str]:
    """Seconds before the end at which the signal is asked for, and where that is said; None if nowhere."""
    if request.config is not None and "slurm" in request.config.model_fields_set:
        return request.config.slurm.signal_lead_s, "slurm.signal_lead_s"
    for root in (Path.cwd(), Path(ccmdist.__file__).parents[1]):
        if (root / SCRIPT).is_file() and (match := SIGNAL.search((root / SCRIPT).read_text())):
            return int(match[1]), str(SCRIPT)
    return None, ""


def measure(events: Sequence[Mapping[str, Any]]) -> Measured | None:
    """The longest save, step and validation in a ledger; None before the first commit."""
    saves = [event["seconds"] for event in events if event["event"] == "commit"]
    if not saves:
        return None
    stretches: dict[tuple[int, int, int], float] = defaultdict(float)
    validations = [0.0]
    for event in events:
        if event.get("section") in IN_A_STEP and event["last_step"] > event["step"]:
            stretches[event["attempt"], event["step"], event["last_step"]] += event["seconds"]
        elif event.get("section") == "validation":
            validations.append(event["seconds"])
    steps = [seconds / (last - first) for (_, first, last), seconds in stretches.items()]
    return Measured(max(saves), max(steps, default=0.0), max(validations))


def _lead(lead_s: int | None, source: str, measured: Measured) -> Finding:
    times = (
        f"step {measured.step_s:.1f} s, validation {measured.validation_s:.1f} s, save {measured.save_s:.1f} s: "
        f"{measured.needed_s} s needed"
    )
    setting = f"--signal=USR2@{measured.needed_s} in {SCRIPT}, or slurm.signal_lead_s={measured.needed_s}"
    if lead_s is None:
        return Finding("signal lead", "WARN", f"none is set; {times}", f"set {setting}: else a time limit loses steps")
    if lead_s < measured.needed_s:
        remedy = f"set {setting}: a save that is cut off costs the steps since the last checkpoint"
        return Finding("signal lead", "WARN", f"{lead_s} s ({source}); {times}", remedy)
    return Finding("signal lead", "OK", f"{lead_s} s ({source}); {times}")


def _graces(graces: Mapping[str, int | None], measured: Measured, slurm: Mapping[str, str]) -> Findings:
    short = {name: grace for name, grace in graces.items() if grace is not None and grace < measured.needed_s}
    if short:
        kill_wait = slurm.get("KillWait", "?")
        found = ", ".join(f"{name} {grace} s" for name, grace in short.items())
        remedy = (
            f"ask the site for GraceTime={measured.needed_s}, or commit more often (checkpoint.every_steps): "
            "a preempted job may be killed before it has saved"
        )
        yield Finding("grace", "WARN", f"GraceTime of {found}, then KillWait {kill_wait}", remedy)


def _forced_exit(request: Request, lead_s: int | None, source: str) -> Findings:
    """A hung rank should end itself while the batch script is still alive to ask for the job again."""
    if request.config is not None and lead_s is not None and request.config.forced_exit_s >= lead_s:
        remedy = f"set forced_exit_s={max(1, lead_s - 30)}: else a rank that hangs is ended by Slurm, not by itself"
        found = f"{request.config.forced_exit_s:.0f} s after a signal, which comes {lead_s} s before the end ({source})"
        yield Finding("forced exit", "WARN", found, remedy)
