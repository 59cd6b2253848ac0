"""The files that units of work leave in the folder of a report: where they lie, and numbers or JSON in them.

A name carries the identity of all that decides what is in the file: other settings make other files, and a second run
finds what the first one left. What cannot be read is not there, and is made again.
"""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ccmdist.commit import commit_bytes

MEASURES: Final = "measures"
"""What is measured on single images."""
FEATURES: Final = "features"
"""What extractors see."""
NEIGHBOURS: Final = "neighbours"
"""The training frames that images come nearest to."""
CELLS: Final = "downstream"
"""Networks that were trained and tested."""
FOLDERS: Final = (MEASURES, FEATURES, NEIGHBOURS, CELLS)


def num_stored(out: Path) -> int:
    """How many files units have left in the folder of a report."""
    return sum(1 for folder in FOLDERS for _ in (out / folder).glob("[!.]*"))


def stored_path(folder: Path, stem: str, identity: str, ending: str) -> Path:
    """Where a unit leaves its file.

    Args:
        folder: One of :data:`FOLDERS` in that of the report.
        stem: What it is, for people.
        identity: Digest of all that decides what is in it.
        ending: Such as json.
    """
    return folder / f"{stem}-{identity[:20]}.{ending}"


def commit_numbers(path: Path, values: NDArray[np.float64], about: dict[str, Any]) -> None:
    """Write numbers of any shape and what they are, completely or not at all; equal ones are equal bytes."""
    # One entry: safetensors writes several in no fixed order.
    commit_bytes(path, save({"values": np.ascontiguousarray(values)}, {"about": json.dumps(about)}))


def read_numbers(path: Path) -> tuple[NDArray[np.float64], dict[str, Any]] | None:
    """What :func:`commit_numbers` wrote; None if there is nothing that can be read."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return file.get_tensor("values"), json.loads((file.metadata() or {})["about"])
    except (SafetensorError, KeyError, ValueError):
        return None


def read_json(path: Path) -> dict[str, Any] | None:
    """What an earlier run has left as JSON; None if there is nothing that can be read."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
