"""The table of a folder of frames: which files belong together, whose they are and what is known about them.

Messages name the table, a line and a column; what stands in a cell may be personal and is not repeated.
"""

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Final

from ccmdist.ccm.groups import ClinicalGroup, parse_group
from ccmdist.ccm.prompts import FIELD_WORDS
from ccmdist.console import log
from ccmdist.data.pseudonyms import canonical
from ccmdist.data.triple import Eye, prompt_for
from ccmdist.errors import ShardError

REQUIRED: Final = ("image", "mask", "subject", "eye", "um_per_px", "clinical_group")
CODES: Final = tuple(name for name in FIELD_WORDS if name != "eye")
OPTIONAL_FILES: Final = ("inpaint_mask", "points")
OPTIONAL: Final = (*CODES, *OPTIONAL_FILES)
UM_PER_PX_RANGE: Final = (0.1, 10.0)
MAX_TABLE_BYTES: Final = 1 << 28
UNKNOWN: Final = "unknown"
"""Says the same as a blank cell, for the eye and the optional fields."""
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class Row:
    """One frame."""

    line: int
    """In the table, counted from 1."""
    image: Path
    mask: Path
    """Files inside the source folder, all links resolved."""
    name: str
    """Of the image's file, from the source folder on; as private as the subject."""
    subject: str
    """As the table names it, in its canonical spelling. Never leaves this machine's memory."""
    clinical_group: ClinicalGroup | None
    eye: Eye | None
    um_per_px: float
    fields: dict[str, str]
    inpaint_mask: Path | None = None
    points: Path | None = None
    """Likewise files, where the table names them."""

    @property
    def files(self) -> dict[str, Path]:
        """The files that there are, by their columns."""
        named = {"image": self.image, "mask": self.mask, "inpaint_mask": self.inpaint_mask, "points": self.points}
        return {name: path for name, path in named.items() if path is not None}


def read_table(source: Path, table: str) -> tuple[list[Row], list[str]]:
    """The rows of a table that are in order, and the problems of the others, one text each.

    Args:
        source: Folder to which the paths in the table are relative; none may lead out of it.
        table: Name of a CSV file in it: UTF-8, separated by commas, semicolons or tabs.

    Raises:
        ShardError: If the table cannot be read or lacks columns.
    """
    path = source / table
    reader = _reader(path)
    rows: list[Row] = []
    problems: list[str] = []
    try:
        for cells in reader:
            _add_row(cells, reader.line_num, source, rows, problems)
    except csv.Error as error:
        raise ShardError(f"{path}: line {reader.line_num}: {error}", "save the table as CSV") from None
    if not rows and not problems:
        raise ShardError(f"{path}: has no rows", "add one row for each frame")
    return rows, [*problems, *_contradictions(rows)]


def _reader(path: Path) -> "csv.DictReader[str]":
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise ShardError(f"{path}: has {path.stat().st_size} bytes, expected at most {MAX_TABLE_BYTES}")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror}", "source is a folder with a table, see shards/README.md") from None
    except UnicodeDecodeError:
        raise ShardError(f"{path}: is not UTF-8", "save the table as CSV in UTF-8") from None
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if missing := [name for name in REQUIRED if name not in names]:
        raise ShardError(f"{path}: has no column {', '.join(missing)}", f"expected {', '.join((*REQUIRED, *OPTIONAL))}")
    if double := sorted({name for name in names if name and names.count(name) > 1}):
        raise ShardError(f"{path}: has several columns {', '.join(double)}", "keep one of each")
    if ignored := [name for name in names if name not in (*REQUIRED, *OPTIONAL)]:
        log.info("%s: columns that are not packed: %s", path, ", ".join(ignored))
    reader.fieldnames = names
    return reader


def _add_row(cells: Mapping[str, str], line: int, source: Path, rows: list[Row], problems: list[str]) -> None:
    found: list[str] = []
    if None in cells or None in cells.values():
        problems.append(f"line {line}: has another number of cells than the header")
        return
    cells = {name: text.strip() for name, text in cells.items()}
    image, mask = _file(source, cells, "image", found), _file(source, cells, "mask", found)
    optional = {name: _file(source, cells, name, found) for name in OPTIONAL_FILES if cells.get(name)}
    if not cells["subject"]:
        found.append("subject is empty, and splits are made by subject")
    clinical_group = _group(cells, found)
    eye, fields = _codes(cells, found)
    um_per_px = _um_per_px(cells, found)
    problems += [f"line {line}: {problem}" for problem in found]
    if not found and image is not None and mask is not None:
        name = image.relative_to(source.resolve()).as_posix()
        subject = canonical(cells["subject"])
        rows.append(Row(line, image, mask, name, subject, clinical_group, eye, um_per_px, fields, **optional))


def _file(source: Path, cells: Mapping[str, str], name: str, found: list[str]) -> Path | None:
    relative = Path(cells[name])
    if not cells[name]:
        found.append(f"{name} is empty")
    elif relative.is_absolute() or ".." in relative.parts:
        found.append(f"{name} leads out of the source folder; write a path relative to it, without ..")
    else:
        try:
            path = (source / relative).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            found.append(f"{name} is a file that does not exist in the source folder")
            return None
        if not path.is_relative_to(source.resolve()):
            found.append(f"{name} is a link that leads out of the source folder; copy the file into it")
        elif not path.is_file():
            found.append(f"{name} is no file")
        else:
            return path
    return None


def _group(cells: Mapping[str, str], found: list[str]) -> ClinicalGroup | None:
    try:
        return parse_group(cells["clinical_group"], "")
    except ShardError as error:
        found.append(f"clinical_group is not a known code; {error.remedy}")
        return None


def _codes(cells: Mapping[str, str], found: list[str]) -> tuple[Eye | None, dict[str, str]]:
    """The eye and the optional fields, as far as they are known."""
    codes = {name: cells[name] for name in FIELD_WORDS if cells.get(name) and cells[name] != UNKNOWN}
    for name, code in codes.items():
        try:
            prompt_for(None, None, {name: code})
        except ShardError as error:
            found.append(f"{name} is not a known code; {error.remedy}; or leave it blank")
    eye = codes.pop("eye", None)
    return eye if eye in ("OD", "OS") else None, codes  # type: ignore[return-value]


def _um_per_px(cells: Mapping[str, str], found: list[str]) -> float:
    try:
        value = float(cells["um_per_px"])
    except ValueError:
        value = math.nan
    low, high = UM_PER_PX_RANGE
    if not low <= value <= high:
        found.append(f"um_per_px is no number from {low} to {high}; write micrometres per pixel such as 1.0417")
    return value


def _contradictions(rows: list[Row]) -> list[str]:
    """What two rows say differently or say twice."""
    problems: list[str] = []
    by_image: dict[Path, int] = {}
    by_subject: dict[str, Row] = {}
    for row in rows:
        for (one, path), (other, same) in combinations(row.files.items(), 2):
            if path == same:
                problems.append(f"line {row.line}: {one} and {other} are one file")
        if (line := by_image.setdefault(row.image, row.line)) != row.line:
            problems.append(f"line {row.line}: the image is that of line {line}; keep one row for each frame")
        first = by_subject.setdefault(row.subject, row)
        if first.clinical_group != row.clinical_group:
            problems.append(f"line {row.line}: the subject has another clinical_group than in line {first.line}")
    return problems
