"""``ccmdist status RUN``: where a run or a synthetic set stands, once or until it is over; only reads, without torch.

``--json`` prints one object with the keys of :class:`ccmdist.diagnostics.standing.Standing`, null where something is
not known; with ``--watch``, one object per line whenever one of them has changed.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.live import Live

from ccmdist.diagnostics.standing import Standing, standing
from ccmdist.diagnostics.status_view import WIDTH, line, page

REFRESH_S: Final = 2.0
OVER: Final = ("done", "refused")
"""States in which nothing changes until somebody does something: a watch ends."""


def show(run: Path, as_json: bool, watch: bool) -> None:
    """Print where the run or the synthetic set in ``run`` stands.

    Args:
        run: Its folder.
        as_json: Print JSON instead of a page.
        watch: Go on every 2 s until it is done or refused, or ctrl-C; on a terminal the page is drawn anew, elsewhere
            a line is added whenever something has changed.

    Raises:
        RunError: If the folder holds neither, or may not be read.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows bars as question marks
    if not watch:
        now = standing(run)
        Console(width=_width()).print(page(now)) if not as_json else _tell(_as_json(now, indent=2))
        return
    with contextlib.suppress(KeyboardInterrupt):
        if as_json or not sys.stdout.isatty():
            _add_lines(run, _as_json if as_json else _as_line)
        else:
            _draw(run)


def _draw(run: Path) -> None:
    """Draw the page anew until the run is over."""
    console = Console(width=_width())
    with Live(console=console, auto_refresh=False) as live:
        for now in _looks(run):
            live.update(page(now), refresh=True)


def _add_lines(run: Path, text: Callable[[Standing], str]) -> None:
    """Print a line for the first look and for every one that brings news."""
    before = None
    for now in _looks(run):
        news = _news(now)
        if news != before:
            _tell(text(now))
        before = news


def _looks(run: Path) -> Iterator[Standing]:
    """Look every few seconds until the run is over."""
    while True:
        now = standing(run)
        yield now
        if now.state in OVER:
            return
        time.sleep(REFRESH_S)


def _news(now: Standing) -> tuple[object, ...]:
    """What makes a new line worth its place; ages alone do not."""
    attempts = [(attempt.state, attempt.last_step) for attempt in now.attempts]
    return now.state, now.step, now.committed_step, attempts, now.slurm and now.slurm.state


def _as_json(now: Standing, indent: int | None = None) -> str:
    return json.dumps(dataclasses.asdict(now), indent=indent, ensure_ascii=False)


def _as_line(now: Standing) -> str:
    return f"{time.strftime('%H:%M:%S')} {line(now)}"


def _tell(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _width() -> int:
    """The page's width, less on a narrow terminal."""
    return min(WIDTH, shutil.get_terminal_size().columns)
