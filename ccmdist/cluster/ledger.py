"""The ledger of a run: what every attempt's wall time was spent on; one JSON object per line, only ever appended.

    {"time", "attempt", "event": "attempt", "step", "began", "job", "restart", "ranks", "gpus", "host"}
    {"time", "attempt", "event": "section", "section", "seconds", "step", "last_step"}
    {"time", "attempt", "event": "commit", "step", "seconds"}
    {"time", "attempt", "event": "end", "state", "reason", "step"}

``time`` and ``began`` are Unix seconds. A section line holds what was spent since the line before, over the steps
after ``step`` up to ``last_step``. An attempt that was killed has no "end"; its last line may be torn.
"""

import json
import math
import os
import socket
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from ccmdist.cluster.ranks import Job
from ccmdist.cluster.run_directory import Outcome
from ccmdist.cluster.sections import SECTIONS, Sections
from ccmdist.console import log

Event = dict[str, Any]

OF_STEPS: Final = frozenset(("data_wait", "compute", "validation", "checkpoint"))
"""Sections whose time is wasted when their steps have to be done again."""
BUCKETS: Final = (*SECTIONS, "wasted", "queue", "other")
NUMBERS: Final = {
    "attempt": ("step", "began"),
    "section": ("seconds", "step", "last_step"),
    "commit": ("step", "seconds"),
    "end": ("step",),
}
"""What a line must hold beside ``time`` and ``attempt`` to be reckoned with."""


def read_ledger(path: Path) -> list[Event]:
    """The events in a ledger, oldest first; empty if there is none. What is torn or cannot be read is left out."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    return [event for line in lines if (event := _event(line)) is not None]


def buckets(events: Sequence[Event]) -> dict[str, float]:
    """Seconds of a run's wall time by what they were spent on; they sum to the time since its first job began.

    ``wasted`` is what went into steps that a later attempt had to do again, ``queue`` the time from an attempt's last
    line to the start of the next job (so also what a killed attempt did after that line), ``other`` the rest.
    """
    attempts = _attempts(events)
    spent = dict.fromkeys(BUCKETS, 0.0)
    for number, lines in enumerate(attempts):
        surviving = min((_first_step(later) for later in attempts[number + 1 :]), default=math.inf)
        _add_attempt(spent, lines, surviving)
    for before, after in pairwise(attempts):
        spent["queue"] += max(after[0]["began"] - _last_time(before), 0.0)
    return spent


def ettr(spent: dict[str, float], with_queue: bool = True) -> float:
    """Effective training time ratio, or goodput: steps that survive over all wall time; 0 before any time has passed.

    Args:
        spent: From :func:`buckets`.
        with_queue: Whether the time between attempts counts as the run's.
    """
    wall_s = sum(spent.values()) - (0.0 if with_queue else spent["queue"])
    return (spent["data_wait"] + spent["compute"]) / wall_s if wall_s > 0 else 0.0


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    numbers = [event.get(name) for name in ("time", "attempt", *NUMBERS.get(event["event"], ()))]
    return event if all(isinstance(number, int | float) and 0 <= number < 1e12 for number in numbers) else None


def _attempts(events: Sequence[Event]) -> list[list[Event]]:
    """The lines of every attempt, its "attempt" line first."""
    starts = [event for event in events if event["event"] == "attempt"]
    return [
        [start, *(event for event in events if event["attempt"] == start["attempt"] and event is not start)]
        for start in starts
    ]


def _first_step(lines: Sequence[Event]) -> int:
    """Where an attempt went on: what was committed by name may have turned out to be broken when it was restored."""
    restored = [line["step"] for line in lines if line.get("section") == "restore"]
    return int(restored[0] if restored else lines[0]["step"])


def _last_time(lines: Sequence[Event]) -> float:
    return float(max(line["time"] for line in lines))


def _add_attempt(spent: dict[str, float], lines: Sequence[Event], surviving: float) -> None:
    """Add the time of one attempt, of which the steps up to ``surviving`` were not done again."""
    known_s, committed = 0.0, _first_step(lines)
    for line in lines:
        if line["event"] == "commit":
            committed = max(committed, line["step"])
        elif line["event"] == "section" and line["section"] in SECTIONS:
            share = _surviving_share(line, surviving, committed)
            spent[line["section"]] += share * line["seconds"]
            spent["wasted"] += (1 - share) * line["seconds"]
            known_s += line["seconds"]
    spent["other"] += max(_last_time(lines) - lines[0]["began"] - known_s, 0.0)


def _surviving_share(line: Event, surviving: float, committed: int) -> float:
    """The part of a line's time that went into what was not done again.

    A line of the last surviving step itself is lost if it was written after that step had been committed: it tells of
    the next step, which nobody saw the end of.
    """
    first, last = line["step"], line["last_step"]
    if line["section"] not in OF_STEPS or last < surviving or last == surviving > committed:
        return 1.0
    return max(surviving - first, 0) / (last - first) if last > first else 0.0


class Ledger:
    """Writes what one attempt does. Only rank 0 begins one; until then, and elsewhere, nothing is written.

    A ledger that cannot be written (a full disk) is told once and never ends a run.
    """

    def __init__(self, path: Path, sections: Sections) -> None:
        self.path, self.sections = path, sections
        self._descriptor: int | None = None
        self._is_torn = self._has_failed = False
        self._start: Event = {}
        self._earlier: list[Event] = []
        self._spent_before = dict.fromkeys(BUCKETS, 0.0)
        self._step = 0

    def begin(self, step: int, job: Job | None, num_ranks: int, num_gpus: int) -> None:
        """Open the ledger and write that an attempt begins, at ``step`` as far as is known before the restore."""
        try:
            self._earlier = read_ledger(self.path)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            size = os.fstat(self._descriptor).st_size
            self._is_torn = size > 0 and os.pread(self._descriptor, 1, size - 1) != b"\n"
        except OSError as error:
            self._tell(error)
        self._step = step
        self._start = {
            "attempt": 1 + max((event["attempt"] for event in self._earlier), default=-1),
            "began": self.sections.began,
            "ranks": num_ranks,
            "gpus": num_gpus,
            "job": job.job_id if job else "",
            "restart": job.restart_count if job else 0,
            "host": socket.gethostname(),
        }
        self._write("attempt", step=step, **self._start)

    def resumed(self, step: int) -> None:
        """Write what it took to come to ``step``, from where training goes on."""
        self._step = step
        if self._descriptor is not None:
            here = self._start | {"event": "attempt", "time": self.sections.began, "step": step}
            self._spent_before = buckets([*self._earlier, here])
        self.flush(step)

    def flush(self, step: int) -> None:
        """Write what was spent in each section since the last time, now that ``step`` steps are done."""
        first, self._step = self._step, max(step, self._step)
        for section, seconds in self.sections.taken().items():
            if seconds > 0:
                line = {"section": section, "seconds": round(seconds, 6), "step": first, "last_step": self._step}
                self._write("section", **line)

    def commit(self, step: int, seconds: float) -> None:
        """Write that ``step`` was committed by a save that kept the ranks waiting for ``seconds``."""
        self.flush(step)
        self._write("commit", step=step, seconds=round(seconds, 6))

    def end(self, outcome: Outcome) -> None:
        """Write how the attempt ended."""
        self.flush(self.sections.done)
        self._write("end", state=outcome.state, reason=outcome.reason, step=outcome.step)

    def spent(self) -> dict[str, float]:
        """The buckets of the run up to now, all earlier attempts included."""
        now, spent = self.sections.now(), dict(self._spent_before)
        totals = {section: self.sections.totals[section] for section in SECTIONS}
        for section, seconds in totals.items():
            spent[section] += seconds
        spent["other"] += max(now - self.sections.began - sum(totals.values()), 0.0)
        return spent

    def _write(self, event: str, **values: Any) -> None:
        if self._descriptor is None:
            return
        values = {"time": round(self.sections.now(), 6), "attempt": self._start["attempt"], "event": event} | values
        line = ("\n" if self._is_torn else "") + json.dumps(values) + "\n"
        try:
            # One call, so that a kill tears at most this line, and what another process appends is never mixed in.
            data = line.encode()
            self._is_torn = os.write(self._descriptor, data) < len(data)
        except OSError as error:
            self._tell(error)

    def _tell(self, error: OSError) -> None:
        if not self._has_failed:
            log.warning("%s: could not be written (%s); training goes on, its times are not kept", self.path, error)
        self._has_failed = True
