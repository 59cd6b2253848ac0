"""Rows of a result: one claim each, written to results/NAME.json and printed as a table."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def command() -> str:
    """The command that runs this script, as a reader would type it at the clone's root."""
    script = Path(sys.argv[0]).resolve().relative_to(ROOT)
    return " ".join(["python", str(script), *sys.argv[1:]])


@dataclass(frozen=True)
class Row:
    """One claim and what was measured.

    Attributes:
        claim: What was measured, with its unit and its settings.
        ours: The figure.
        anchor: What it is compared with, measured in the same run; or text that names a published figure.
        limit: The bound that must hold; None for what is only reported.
        goal: The bound that is aimed at.
        at_least: Whether the bounds are lower ones.
        command: That measured it.
    """

    claim: str
    ours: float
    anchor: float | str | None = None
    limit: float | None = None
    goal: float | None = None
    at_least: bool = False
    command: str = field(default_factory=command)

    @property
    def ratio(self) -> float | None:
        """Ours by the anchor, if the anchor is a figure."""
        return self.ours / self.anchor if isinstance(self.anchor, int | float) and self.anchor else None

    @property
    def holds(self) -> bool | None:
        """Whether the limit holds; None if there is none."""
        if self.limit is None:
            return None
        return self.ours >= self.limit if self.at_least else self.ours <= self.limit

    def as_json(self) -> dict[str, Any]:
        """The row as results/*.json holds it."""
        values = asdict(self)
        del values["at_least"]
        order = ("claim", "ours", "anchor", "limit", "goal", "holds", "command")
        values["holds"] = self.holds
        return {name: values[name] for name in order}


def write(name: str, rows: Sequence[Row]) -> None:
    """Write the rows; what takes long writes those that it has, again and again."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")


def finish(name: str, rows: Sequence[Row]) -> int:
    """Write the rows, print them, and return the exit code: 1 if a limit does not hold."""
    write(name, rows)
    table = Table("claim", *("ours", "anchor", "ours / anchor", "limit", "goal", "holds"))
    for row in rows:
        bound = ">= " if row.at_least else "<= "
        figures = [row.ours, row.anchor, row.ratio]
        bounds = ["" if b is None else f"{bound}{told(b)}" for b in (row.limit, row.goal)]
        verdict = {None: "", True: "yes", False: "NO"}[row.holds]
        table.add_row(row.claim, *map(told, figures), *bounds, verdict)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)
    return int(any(row.holds is False for row in rows))


def told(value: float | str | None) -> str:
    """A figure as the table shows it: four digits are enough."""
    return "" if value is None else value if isinstance(value, str) else f"{value:,.4g}"
