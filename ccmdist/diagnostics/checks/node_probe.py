"""One process per node: what one writes, do the others see it, when, and do locks and clocks agree between nodes.

    python -m ccmdist.diagnostics.checks.node_probe FOLDER        started by srun, one task per node

The first task holds a lock and writes ``ping``; each other one, as soon as it sees that, tries the lock and writes
``pong-RANK``; the first one measures how long that takes. All poll by opening a name, because listings of network
file systems lag more. The first task prints one JSON object.
"""

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final

from ccmdist.cluster.ranks import Ranks, ranks_from_environment
from ccmdist.commit import commit_json
from ccmdist.diagnostics.checks.trial import clock_skew_s

TIMEOUT_S: Final = 45.0
"""NFS may remember for half a minute that a file is not there."""
POLL_S: Final = 0.01


def main() -> None:
    """Play one part of the exchange in the folder that the command line names."""
    ranks, folder = ranks_from_environment() or Ranks(0, 0, 1), Path(sys.argv[1])
    if ranks.is_first:
        sys.stdout.write(json.dumps(first(folder, ranks.world_size)) + "\n")
    else:
        other(folder, ranks.global_rank)


def first(folder: Path, world_size: int) -> dict[str, Any]:
    """What the first task finds: nodes that were not seen, seconds for a file there and back, locks, clocks."""
    missing, _ = _wait([folder / f"hello-{rank}" for rank in range(1, world_size)], TIMEOUT_S)
    if missing:
        return {"num_unseen": len(missing)}
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begin = time.monotonic()
        commit_json(folder / "ping", {})
        missing, texts = _wait([folder / f"pong-{rank}" for rank in range(1, world_size)], TIMEOUT_S)
        seconds = time.monotonic() - begin
    pongs = [json.loads(text) for text in texts]
    skews = [clock_skew_s(folder), *(pong["clock_skew_s"] for pong in pongs)]
    return {
        "num_unseen": len(missing),
        "round_trip_s": seconds,
        "lockless": [pong["host"] for pong in pongs if not pong["lock_was_refused"]],
        "clock_spread_s": max(skews) - min(skews),
    }


def other(folder: Path, global_rank: int) -> None:
    """Answer the first task."""
    commit_json(folder / f"hello-{global_rank}", {})
    missing, _ = _wait([folder / "ping"], 2 * TIMEOUT_S)
    if missing:
        return
    place = folder / f"clock-{global_rank}"
    place.mkdir()
    pong = {
        "host": socket.gethostname(),
        "lock_was_refused": _is_refused(folder / "lock"),
        "clock_skew_s": clock_skew_s(place),
    }
    commit_json(folder / f"pong-{global_rank}", pong)


def _is_refused(path: Path) -> bool:
    try:
        with path.open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _wait(paths: list[Path], timeout_s: float) -> tuple[list[Path], list[str]]:
    """Those of the files that cannot be opened after ``timeout_s``, and the texts of the others."""
    deadline = time.monotonic() + timeout_s
    texts: dict[Path, str] = {}
    while len(texts) < len(paths) and time.monotonic() < deadline:
        for path in (path for path in paths if path not in texts):
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except OSError:
                continue
            with os.fdopen(descriptor) as file:
                texts[path] = file.read()
        time.sleep(POLL_S)
    return [path for path in paths if path not in texts], list(texts.values())


if __name__ == "__main__":
    main()
