"""How ``ccmdist doctor`` looks: a table by area within 100 columns, what to do about it, and one line of verdict."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ccmdist.diagnostics.checks.finding import Finding, Request, State

WIDTH: Final = 100
STYLES: Final[dict[State, str]] = {"MISS": "bold red", "WARN": "yellow", "OK": "green"}
WORST_FIRST: Final[tuple[State, ...]] = ("MISS", "WARN", "OK")


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Say on a terminal that something is going on: an import of torch takes seconds."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status("looking around, importing torch ..."):
        yield


def show(report: Mapping[str, Sequence[Finding]], request: Request, seconds: float) -> None:
    """Print the report to standard output."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(_table(report))
    todo = [(area, finding) for state in ("MISS", "WARN") for area, finding in _with_state(report, state)]
    if todo:
        console.print()
        console.print(_remedies(todo))
    console.print()
    console.print(_verdict(report, request, seconds))


def _with_state(report: Mapping[str, Sequence[Finding]], state: str) -> Iterator[tuple[str, Finding]]:
    for area, findings in report.items():
        yield from ((area, finding) for finding in findings if finding.state == state)


def _table(report: Mapping[str, Sequence[Finding]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, expand=False)
    for area, findings in report.items():
        table.add_row(Text(area, "bold"), "", "", "")
        for finding in sorted(findings, key=lambda finding: WORST_FIRST.index(finding.state)):
            state = Text(finding.state, STYLES[finding.state])
            table.add_row("", state, Text(finding.what), Text(finding.found, overflow="fold"))
    return table


def _remedies(todo: Sequence[tuple[str, Finding]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False, expand=False)
    for _, finding in todo:
        name = Text(finding.what, STYLES[finding.state])
        table.add_row(Text("->", STYLES[finding.state]), name, Text(finding.remedy, overflow="fold"))
    return table


def _verdict(report: Mapping[str, Sequence[Finding]], request: Request, seconds: float) -> Text:
    counts = Counter(finding.state for findings in report.values() for finding in findings)
    told = ", ".join(f"{counts[state]} {state}" for state in WORST_FIRST if counts[state])
    asked = [*(["these settings"] if request.config else []), *sorted(request.required)]
    subject = f"this machine{' with ' if asked else ''}{', '.join(asked)}"
    verdict, style = ("NOT FIT", STYLES["MISS"]) if counts["MISS"] else ("FIT", STYLES["OK"])
    return Text(f"{verdict}: {subject}: {told}, in {seconds:.1f} s", style)
