"""One attempt at a run, as srun would start it: real ranks, real signals, real files, watched from outside."""

import math
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ccmdist.cluster.faults import VARIABLE
from ccmdist.cluster.preemption import STOP_SIGNALS, hold_back_stop_signals
from ccmdist.cluster.ranks import Ranks
from drill.faults import MAX_OFFSET

SECONDS_FOR_THE_OTHERS = 3.0
SECONDS_OF_SILENCE = 120.0
STEP_DONE = re.compile(r"step (\d+)/\d+  (loss \S+ \(max \S+\)  grad norm \S+)")
STARTED = re.compile(r"training .* from step (\d+)")
COMMITTED = re.compile(r"step (\d+): checkpoint committed")


@dataclass
class Attempt:
    """What was seen of an attempt.

    Attributes:
        start: When its processes were started, in seconds of the monotonic clock, as all times here.
        end: When the last of them was gone.
        exit_codes: Of all ranks; a negative number is the signal that ended a rank.
        lines: What the ranks said, and when it was read.
        struck: When the fault struck, or None.
        fell_silent: Whether it had to be killed because for minutes no rank said anything.
    """

    start: float
    end: float = 0.0
    exit_codes: list[int] = field(default_factory=list)
    lines: list[tuple[float, str]] = field(default_factory=list)
    struck: float | None = None
    fell_silent: bool = False

    @property
    def first_step(self) -> int | None:
        """The step it went on from, or None if it did not come so far."""
        return next((int(found[1]) for _, line in self.lines if (found := STARTED.search(line))), None)

    def steps(self) -> list[tuple[float, int, str]]:
        """Time, number and curve values of every step that was done."""
        return [(when, int(f[1]), f[2]) for when, line in self.lines if (f := STEP_DONE.search(line))]

    def durations(self) -> dict[int, float]:
        """Step -> seconds from the line before, which is that of the start, of another step or of a commit."""
        seconds, before = {}, None
        for when, line in self.lines:
            if (found := STEP_DONE.search(line)) and before is not None:
                seconds[int(found[1])] = when - before
            if found or STARTED.search(line) or COMMITTED.search(line):
                before = when
        return seconds

    def said(self, text: str) -> bool:
        """Whether a rank said ``text``."""
        return any(text in line for _, line in self.lines)


@dataclass(frozen=True)
class Order:
    """How the ranks of an attempt are started.

    Attributes:
        job: File with the settings of the run.
        log: Where the ranks write what they say.
        num_ranks: How many there are.
        variable: CCMDIST_FAULT.
        file_limit: Rank -> bytes at which the kernel kills it amid the write of a file.
        signal_at: (seconds after the start, signal, ranks), or None; a quick attempt gets it after MAX_OFFSET steps.
        began: When the job began, in Unix seconds, as its batch script would say.
    """

    job: Path
    log: Path
    num_ranks: int
    variable: str = ""
    file_limit: dict[int, int] = field(default_factory=dict)
    signal_at: tuple[float, signal.Signals, list[int]] | None = None
    began: float = field(default_factory=time.time)


def run_attempt(context: Any, order: Order, look: Callable[[Attempt], None]) -> Attempt:
    """Start the ranks, call ``look`` every few milliseconds until all are gone, and tell what was seen.

    When one rank fails the others are killed a little later, as ``srun --kill-on-bad-exit=1`` does.
    """
    rendezvous = order.log.with_suffix(".rendezvous")
    rendezvous.unlink(missing_ok=True)
    order.log.write_text("")
    children = [
        context.Process(target=_rank, args=(order, rank, f"file://{rendezvous}")) for rank in range(order.num_ranks)
    ]
    attempt = Attempt(time.monotonic())
    hold_back_stop_signals()  # ranks inherit it until they have a handler, as from `ccmdist train`
    for child in children:
        child.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        with order.log.open() as log:
            _watch(children, order, attempt, lambda: _read(log, attempt), look)
    finally:
        for child in children:  # after ctrl-C; a child that is gone takes no notice
            child.kill()
    attempt.end = time.monotonic()
    attempt.exit_codes = [child.exitcode for child in children]
    return attempt


def _watch(
    children: list[Any],
    order: Order,
    attempt: Attempt,
    read: Callable[[], None],
    look: Callable[[Attempt], None],
) -> None:
    deadline = math.inf
    pending = order.signal_at
    while True:
        alive = [child for child in children if child.exitcode is None]
        read()
        look(attempt)
        if not alive:
            return
        now = time.monotonic()
        if pending and (now - attempt.start >= pending[0] or len(attempt.steps()) >= MAX_OFFSET):
            attempt.struck = now
            for rank in pending[2]:
                if children[rank].exitcode is None:
                    os.kill(children[rank].pid, pending[1])
            pending = None
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, now + SECONDS_FOR_THE_OTHERS)
            if order.file_limit and attempt.struck is None:
                attempt.struck = now  # the kernel does not say when it killed
        if now - (attempt.lines[-1][0] if attempt.lines else attempt.start) > SECONDS_OF_SILENCE:
            attempt.fell_silent, deadline = True, now
        if now >= deadline:
            for child in alive:
                child.kill()
        time.sleep(0.01)


def _read(log: Any, attempt: Attempt) -> None:
    now = time.monotonic()
    for line in log.readlines():
        attempt.lines.append((now, line.rstrip()))
        if line.startswith("fault:") and attempt.struck is None:
            attempt.struck = now


def _rank(order: Order, rank: int, rendezvous: str) -> None:
    """The process of one rank."""
    output = os.open(order.log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    from ccmdist.jobs.train_rank import run_rank

    os.environ[VARIABLE] = order.variable
    os.environ["CCMDIST_JOB_START"] = str(order.began)
    if limit := order.file_limit.get(rank):
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.exit(run_rank(str(order.job), Ranks(rank, rank, order.num_ranks), rendezvous))
