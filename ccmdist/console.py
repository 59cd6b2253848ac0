"""What a person sees while a stage runs: a progress bar on a terminal, plain lines with a rate in a log file."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0
log = logging.getLogger("ccmdist")
# peft imports bitsandbytes wherever it is installed, which then advises to install kernels for the CPU.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def start_logging(global_rank: int = 0) -> None:
    """Send log records to stderr: all of rank 0, warnings and above of the others. Safe to call twice."""
    handler = logging.StreamHandler(sys.stderr)
    name = "" if global_rank == 0 else f"rank {global_rank} "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {name}%(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO if global_rank == 0 else logging.WARNING)
    log.propagate = False


def tracked(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Yield ``items`` while showing how far along they are and how long the rest will take.

    Args:
        items: What is worked through; an item counts as done when the next one is asked for.
        what: The plural of an item, such as "shards".
        total: How many there are.
    """
    if sys.stderr.isatty():
        yield from _with_bar(items, what, total)
    else:
        yield from _with_lines(items, what, total)


def _with_bar(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(bar)


def _with_lines(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    start = said = time.monotonic()
    for done, item in enumerate(items):
        yield item
        now = time.monotonic()
        if done + 1 == total or now - said >= SECONDS_BETWEEN_LINES:
            said = now
            rate = (done + 1) / max(now - start, 1e-9)
            log.info(
                "%s: %d of %d, %.3g per second, %.0f s left",
                what,
                done + 1,
                total,
                rate,
                (total - done - 1) / rate,
            )
