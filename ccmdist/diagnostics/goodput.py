"""What a run's time was spent on, what its failures cost, and how often it should commit; from its ledger alone.

What a bucket holds and what goodput is, :mod:`ccmdist.cluster.ledger` says.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ccmdist.cluster.checkpoint_interval import daly_interval_s
from ccmdist.cluster.ledger import Event, buckets, ettr

ASSUMED_HOURS_BETWEEN_FAILURES: Final = 8.0
"""For advice to a run that has not failed yet: about one preemption or lost node per working day."""
IN_LOOP: Final = ("data_wait", "compute", "validation", "checkpoint")
RECENT_LINES: Final = 20
"""Lines of computing in the ledger from which the present pace is taken."""

AttemptState = Literal["running", "done", "requeue", "refused", "killed"]


@dataclass(frozen=True)
class Attempt:
    """One start of the run, as far as the ledger knows it.

    Attributes:
        number: From 0.
        state: "running", or how it ended: "done", "requeue" (committed and stopped), "refused" or "killed".
        reason: Why it ended; "" where nobody said.
        first_step: Steps that were committed when it began.
        last_step: The furthest step that is known of it, committed or not.
        lost_steps: Of these, how many were or will be done again.
        num_commits: Checkpoints that it wrote.
        began: Unix seconds at which its job started.
        last_seen: Unix seconds of its last line.
        ranks: Processes that trained.
        gpus: GPUs that they used; 0 on CPUs.
        host: Of rank 0.
        job: Slurm's id, or "".
    """

    number: int
    state: AttemptState
    reason: str
    first_step: int
    last_step: int
    lost_steps: int
    num_commits: int
    began: float
    last_seen: float
    ranks: int
    gpus: int
    host: str
    job: str

    @property
    def seconds(self) -> float:
        """From the start of its job to its last line."""
        return max(self.last_seen - self.began, 0.0)


@dataclass(frozen=True)
class Advice:
    """How often to commit.

    Attributes:
        save_s: Median of the seconds that a save kept the ranks from training.
        failure_every_s: Mean time between failures that is reckoned with.
        is_assumed: Whether that time was assumed because no failure has been seen.
        interval_s: Advised seconds between two commits.
        interval_steps: The same in steps of this run, at least 1; None while the time of a step is unknown.
    """

    save_s: float
    failure_every_s: float
    is_assumed: bool
    interval_s: float
    interval_steps: int | None


@dataclass(frozen=True)
class Goodput:
    """The figures of a run; None stands for what its ledger cannot tell yet.

    Attributes:
        buckets_s: Seconds of wall time by what they were spent on.
        wall_s: Their sum.
        share: Steps that survive over wall time: the goodput, or ETTR.
        share_without_queue: The same without the time between attempts.
        gpu_hours: GPUs x hours of all attempts.
        num_failures: Attempts that ended without a word: killed, lost with their node, crashed.
        num_stops: Attempts that committed and stopped on a signal.
        mean_s_between_failures: Seconds of running per failure.
        lost_steps: Steps that were or will be done again, of all attempts.
        lost_steps_per_failure: Their mean over the failures.
        recovery_s: Mean seconds from an attempt's last line to the first step beyond what it had reached.
        save_s: Median seconds that a save kept the ranks from training.
        step_s: Recent seconds per step, everything within the training loop included.
        advice: How often to commit.
    """

    buckets_s: dict[str, float]
    wall_s: float
    share: float
    share_without_queue: float
    gpu_hours: float
    num_failures: int
    num_stops: int
    mean_s_between_failures: float | None
    lost_steps: int
    lost_steps_per_failure: float | None
    recovery_s: float | None
    save_s: float | None
    step_s: float | None
    advice: Advice | None


def goodput(events: Sequence[Event], is_alive: bool) -> Goodput | None:
    """The figures of the run whose ledger holds ``events``; None before the first attempt.

    Args:
        events: Lines of the ledger.
        is_alive: Whether the last attempt may still go on; a dead one without an end counts as a failure.
    """
    attempts = attempts_of(events, is_alive)
    if not attempts:
        return None
    spent = buckets([*events, *_next_start(attempts[-1])])
    wall_s = sum(spent.values())
    failures = [attempt for attempt in attempts if attempt.state == "killed"]
    between_s = sum(attempt.seconds for attempt in attempts) / len(failures) if failures else None
    saves = [float(event["seconds"]) for event in events if event["event"] == "commit"]
    save_s = statistics.median(saves) if saves else None
    return Goodput(
        buckets_s=spent,
        wall_s=wall_s,
        share=ettr(spent),
        share_without_queue=ettr(spent, with_queue=False),
        gpu_hours=sum(attempt.gpus * attempt.seconds for attempt in attempts) / 3600,
        num_failures=len(failures),
        num_stops=sum(attempt.state == "requeue" for attempt in attempts),
        mean_s_between_failures=between_s,
        lost_steps=sum(attempt.lost_steps for attempt in attempts),
        lost_steps_per_failure=statistics.fmean(attempt.lost_steps for attempt in failures) if failures else None,
        recovery_s=_recovery_s(events, attempts),
        save_s=save_s,
        step_s=pace(events),
        advice=None if save_s is None else advise(save_s, between_s, pace(events, ("data_wait", "compute"))),
    )


def attempts_of(events: Sequence[Event], is_alive: bool) -> list[Attempt]:
    """Every start of the run, in order; the last one may still go on."""
    of_attempt = [_of_attempt(events, event["attempt"]) for event in events if event["event"] == "attempt"]
    committed = max([event["step"] for event in events if event["event"] in ("attempt", "commit")], default=0)
    # Where the next one began is what survived of this one.
    survived = [*(_first_step(later) for later in of_attempt[1:]), committed]
    last = len(of_attempt) - 1
    return [_attempt(own, survived[i], is_alive and i == last) for i, own in enumerate(of_attempt)]


def advise(save_s: float, failure_every_s: float | None, step_s: float | None) -> Advice:
    """How often to commit, for the least time lost in saves and in steps done again.

    Args:
        save_s: Seconds that a save keeps the ranks from training.
        failure_every_s: Mean time between failures, or None if none was seen. Stops that commit lose no step and so
            do not count.
        step_s: Seconds of a step without saves, or None if unknown.
    """
    between_s = failure_every_s or ASSUMED_HOURS_BETWEEN_FAILURES * 3600
    interval_s = daly_interval_s(save_s, between_s)
    steps = max(round(interval_s / step_s), 1) if step_s else None
    return Advice(save_s, between_s, not failure_every_s, interval_s, steps)


def pace(events: Sequence[Event], sections: Sequence[str] = IN_LOOP) -> float | None:
    """Seconds per step over the last lines of the last attempt that computed anything; None if none did."""
    computed = [event for event in events if event.get("section") == "compute" and event["last_step"] > event["step"]]
    recent = [event for event in computed if event["attempt"] == computed[-1]["attempt"]][-RECENT_LINES:]
    steps = sum(event["last_step"] - event["step"] for event in recent)
    if not steps:
        return None
    attempt, first, last = recent[0]["attempt"], recent[0]["step"], recent[-1]["last_step"]
    seconds = [
        event["seconds"]
        for event in events
        if event.get("section") in sections and event["attempt"] == attempt and first < event["last_step"] <= last
    ]
    return sum(seconds) / steps


def _next_start(last: Attempt) -> list[Event]:
    """The start that a dead attempt will be followed by, so that what it lost already counts as wasted."""
    if not last.lost_steps:
        return []
    step = last.last_step - last.lost_steps
    values = {"time": last.last_seen, "began": last.last_seen, "attempt": last.number + 1, "step": step}
    return [{"event": "attempt", **values}]


def _of_attempt(events: Sequence[Event], number: int) -> list[Event]:
    """The lines of one attempt, the one on its start first."""
    own = [event for event in events if event["attempt"] == number]
    return sorted(own, key=lambda event: event["event"] != "attempt")


def _attempt(events: Sequence[Event], survived: int, is_alive: bool) -> Attempt:
    start, end = events[0], next((event for event in events if event["event"] == "end"), {})
    reached = [event["last_step"] for event in events if event["event"] == "section"]
    committed = [event["step"] for event in events if event["event"] == "commit"]
    first_step = _first_step(events)
    last_step = max([first_step, *reached, *committed])
    state: AttemptState = end.get("state") or ("running" if is_alive else "killed")
    return Attempt(
        number=start["attempt"],
        state=state,
        reason=end.get("reason", ""),
        first_step=first_step,
        last_step=last_step,
        lost_steps=0 if state == "running" else max(last_step - survived, 0),
        num_commits=len(committed),
        began=start["began"],
        last_seen=max(event["time"] for event in events),
        ranks=start.get("ranks", 1),
        gpus=start.get("gpus", 0),
        host=start.get("host", ""),
        job=start.get("job", ""),
    )


def _first_step(events: Sequence[Event]) -> int:
    """Where an attempt went on: what was committed by name may have turned out to be broken when it was restored."""
    restored = [event["step"] for event in events if event.get("section") == "restore"]
    return int(restored[0] if restored else events[0]["step"])


def _recovery_s(events: Sequence[Event], attempts: Sequence[Attempt]) -> float | None:
    """Mean over the interruptions that later attempts have made good."""
    took = []
    for attempt in attempts[:-1]:
        later = [event for event in events if event["attempt"] > attempt.number and event.get("section") == "compute"]
        new = [event["time"] for event in later if event["last_step"] > attempt.last_step]
        took += [min(new) - attempt.last_seen] if new else []
    return statistics.fmean(took) if took else None
