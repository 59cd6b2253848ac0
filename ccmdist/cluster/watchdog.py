"""Ends a process whose main thread stays in one section for too long, after saying which rank the others wait for.

A rank that hangs in a collective does not know why: another one is stopped, dead, or busy elsewhere. So the first
whose time is up calls all of them through the store by which they met; every watchdog that can answers where its main
thread is, and rank 0 tells who does not answer or is behind. Then all end with exit code 70, and whoever started them
starts them again.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

from ccmdist.cluster.preemption import show_stacks
from ccmdist.cluster.ranks import Ranks
from ccmdist.cluster.sections import OUTSIDE, Section, Sections
from ccmdist.config.train import TimeoutSettings
from ccmdist.console import log
from ccmdist.errors import EXIT_INTERNAL

T = TypeVar("T")

LONGEST_LOOK_S: Final = 1.0
TIMEOUT_OF: Final = {
    "startup": "setup_min",
    "restore": "setup_min",
    "validation": "validation_min",
    "checkpoint": "checkpoint_min",
}
"""Which setting limits a section; all others are parts of a step."""
ORDER: Final = ("startup", "restore", OUTSIDE, "validation", "checkpoint", "data_wait", "compute")
"""In which sections follow each other while the number of steps done stays the same."""
COLLECTIVES: Final = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/zero/")
"""Where the source of functions lies in which a main thread waits for other ranks; they are its innermost ones."""
FRAMES_OF_A_WAIT: Final = 4
ALARM, VERDICT = "watchdog/alarm", "watchdog/verdict"


class Store(Protocol):
    """What is asked of a store of torch.distributed."""

    def set(self, key: str, value: str) -> None:
        """Keep a value for all ranks."""
        ...

    def get(self, key: str) -> bytes:
        """The value that some rank has set."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all of these have been set."""
        ...

    def clone(self) -> Any:
        """Another connection, for another thread: one that waits keeps its connection to itself."""
        ...


@dataclass(frozen=True)
class Report:
    """Where the main thread of a rank is.

    Attributes:
        section: Name of its section.
        step: Optimizer steps that were done when it entered it.
        seconds: Since then.
        frame: Its innermost function, file and line.
        waits: Whether it is inside a collective, so that another rank is to blame.
    """

    section: str
    step: int
    seconds: float
    frame: str
    waits: bool

    def __str__(self) -> str:
        return f"{self.section} after step {self.step}"


class Watchdog:
    """Watches the main thread of this process; a context manager.

    Args:
        sections: What the main thread does.
        timeouts: How long it may.
        ranks: The place of this process.
        before_exit: Called by the thread that ends the process, for last words.
    """

    def __init__(
        self, sections: Sections, timeouts: TimeoutSettings, ranks: Ranks, before_exit: Callable[[], None]
    ) -> None:
        self.sections, self.timeouts, self.ranks, self.before_exit = sections, timeouts, ranks, before_exit
        self._finished, self._called = threading.Event(), threading.Event()
        self._store: Store | None = None
        shortest_min = min(timeouts.setup_min, timeouts.step_min, timeouts.validation_min, timeouts.checkpoint_min)
        self._look_s = min(LONGEST_LOOK_S, shortest_min * 60 / 10)

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True, name="hang-watch").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finished.set()

    def listen(self, store: Store) -> None:
        """From now on be called by other ranks through ``store``, and call them."""
        if self.ranks.world_size > 1:
            # Before anything hangs: a connection cannot be made to a rank that is stopped.
            self._store = store.clone()
            threading.Thread(target=self._hear, args=(store.clone(),), daemon=True, name="hang-listen").start()

    def limit(self, section: Section) -> tuple[str, float]:
        """The setting that limits ``section``, and its seconds."""
        name = TIMEOUT_OF.get(section.name, "step_min")
        if not self.sections.is_warm and self.timeouts.setup_min > getattr(self.timeouts, name):
            name = "setup_min"
        return name, getattr(self.timeouts, name) * 60

    def _watch(self) -> None:
        # Time is counted in looks, not by a clock: a job that Slurm suspends for an hour does not hang.
        section, seconds = self.sections.current, 0.0
        while not self._finished.wait(self._look_s):
            seconds = seconds + self._look_s if self.sections.current is section else 0.0
            section = self.sections.current
            name, limit_s = self.limit(section)
            if seconds > limit_s or self._called.is_set():
                why = f"longer than timeouts.{name} allows" if seconds > limit_s else "and another rank waits too long"
                # Whatever this thread's words wait for (a log on a file system that hangs), the process ends.
                _within(3 * self.timeouts.answer_s + 10, lambda: self._last_words(why), None)  # noqa: B023
                os._exit(EXIT_INTERNAL)

    def _hear(self, store: Store) -> None:
        try:
            while not self._finished.wait(self._look_s):
                if store.check([ALARM]):
                    self._called.set()
                    return
        except RuntimeError:
            return  # rank 0, who keeps the store, is gone: collectives will tell

    def _last_words(self, why: str) -> None:
        report = self.report()
        log.error("hang: %s for %.0f s, %s; main thread at %s", report, report.seconds, why, report.frame)
        show_stacks(f"rank {self.ranks.global_rank}: stacks of all threads")
        if self._store is not None:
            silence = "rank 0 does not answer (stopped, dead or unreachable)" if self.ranks.global_rank else ""
            verdict = _within(2 * self.timeouts.answer_s, lambda: self._asked(self._store, report), silence)
            if verdict:
                log.error("hang: %s", verdict)
        self.before_exit()

    def report(self) -> Report:
        """Where the main thread of this process is."""
        section, stack = self.sections.current, _stack_of_main_thread()
        waits = any(part in frame.f_code.co_filename for frame in stack[:FRAMES_OF_A_WAIT] for part in COLLECTIVES)
        return Report(section.name, section.step, time.monotonic() - section.since, _place(stack[0]), waits)

    def _asked(self, store: Any, report: Report) -> str:
        """Call all ranks and answer; on rank 0 who is to blame, elsewhere nothing, or that rank 0 is silent."""
        store.set(ALARM, "")
        store.set(_report_key(self.ranks.global_rank), json.dumps(asdict(report)))
        if self.ranks.is_first:
            verdict = blame(self._reports(store), self.ranks.world_size)
            store.set(VERDICT, verdict)
            log.error("hang: %s", verdict)
            time.sleep(min(1.0, self.timeouts.answer_s))  # while the others learn that it is told
            return ""
        try:
            while not store.check([VERDICT]):
                time.sleep(0.1)
        except RuntimeError:
            pass  # rank 0 has ended, so it has told
        return ""

    def _reports(self, store: Store) -> dict[int, Report]:
        """What all ranks answer that do so in time."""
        reports: dict[int, Report] = {}
        deadline = time.monotonic() + self.timeouts.answer_s
        while len(reports) < self.ranks.world_size and time.monotonic() < deadline:
            for global_rank in set(range(self.ranks.world_size)) - reports.keys():
                if store.check([key := _report_key(global_rank)]):
                    reports[global_rank] = Report(**json.loads(store.get(key)))
            time.sleep(0.1)
        return reports


def blame(reports: Mapping[int, Report], world_size: int) -> str:
    """Which ranks the others wait for: those that do not answer, else those outside collectives, else the hindmost."""
    if silent := [rank for rank in range(world_size) if rank not in reports]:
        return f"{_named(silent)} {'does' if len(silent) == 1 else 'do'} not answer (stopped, dead or unreachable)"
    behind = [rank for rank, report in reports.items() if not report.waits]
    if len(behind) in (0, world_size):
        position = {rank: (report.step, ORDER.index(report.section)) for rank, report in reports.items()}
        behind = [rank for rank in reports if position[rank] < max(position.values())]
    if not behind:
        return f"all ranks answer and are in {reports[0]}: suspect the network, a device or the file system"
    first = reports[min(behind)]
    waiting = next(report for rank, report in reports.items() if rank not in behind)
    return (
        f"the others wait in {waiting} for {_named(sorted(behind))}, since {first.seconds:.0f} s in {first} "
        f"at {first.frame}"
    )


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:16])) + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"


def _report_key(global_rank: int) -> str:
    return f"watchdog/report/{global_rank}"


def _stack_of_main_thread() -> list[FrameType]:
    """Innermost frame first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = []
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({path.parent.name}/{path.name}:{frame.f_lineno})"


def _within(seconds: float, action: Callable[[], T], otherwise: T) -> T:
    """What ``action`` returns, or ``otherwise`` when it takes longer or fails; it is then left alone."""
    results: list[T] = []

    def run() -> None:
        results.append(action())

    thread = threading.Thread(target=run, daemon=True, name="hang-words")
    thread.start()
    thread.join(seconds)
    return results[0] if results else otherwise
