"""What a run relies on is really tried in a folder of its own, which is removed again."""

import contextlib
import errno
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ccmdist.commit import commit_bytes, sync_file, sync_folder

PREFIX: Final = ".ccmdist-doctor-"
BLOCK: Final = bytes(range(256)) * 4096
"""1 MiB."""


@contextlib.contextmanager
def trial_folder(parent: Path) -> Iterator[Path]:
    """A new folder in ``parent`` that is gone afterwards, whatever happens.

    Raises:
        OSError: If it cannot be made: not allowed, read-only, no space or no inode left.
    """
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=parent, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def failures(folder: Path) -> dict[str, str]:
    """Name of what does not work in ``folder`` -> how it failed and what that means."""
    found = {}
    for name, attempt in TRIALS.items():
        place = folder / name.replace(" ", "-")
        place.mkdir()
        try:
            attempt(place)
        except OSError as error:
            found[name] = error.strerror or str(error)
        except Unlike as difference:
            found[name] = str(difference)
    return found


def clock_skew_s(folder: Path) -> float:
    """How far the clock of this machine is ahead of the one that gives files their times."""
    file = folder / "clock"
    before = time.time()
    file.write_bytes(b"x")
    after = time.time()
    given = file.stat().st_mtime
    return before - given if given < before else min(after - given, 0.0)


class Unlike(Exception):  # noqa: N818 (no error of ours)
    """A call succeeded and did something else than on a local file system."""


def _write(folder: Path) -> None:
    commit_bytes(folder / "block", BLOCK)
    if (folder / "block").read_bytes() != BLOCK:
        raise Unlike("a file reads other bytes than were written")


def _rename(folder: Path) -> None:
    """A commit is a rename: of a file over another, and of a folder to a name that is free, never over a full one."""
    (folder / "old").write_bytes(b"old")
    (folder / "new").write_bytes(b"new")
    (folder / "new").replace(folder / "old")
    if (folder / "old").read_bytes() != b"new" or (folder / "new").exists():
        raise Unlike("a file that was renamed over another is not there, or there twice")
    for name in ("step.tmp", "taken"):
        (folder / name).mkdir()
        (folder / name / "part").write_bytes(b"part")
    (folder / "step.tmp").rename(folder / "step")
    if not (folder / "step" / "part").is_file():
        raise Unlike("a folder was renamed without what it holds")
    try:
        (folder / "step").rename(folder / "taken")
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    else:
        raise Unlike("a folder can be renamed over one that holds files, so a checkpoint could be lost")


def _sync(folder: Path) -> None:
    (folder / "file").write_bytes(BLOCK)
    sync_file(folder / "file")
    sync_folder(folder)


def _lock(folder: Path) -> None:
    """Two holders at once would both write to one run."""
    with (folder / "lock").open("wb") as first, (folder / "lock").open("wb") as second:
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        raise Unlike("a lock that is held is given a second time")


def _append(folder: Path) -> None:
    """The ledger grows by whole lines, whoever writes."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    writers = [os.open(folder / "ledger", flags, 0o600) for _ in range(2)]
    try:
        for number in range(8):
            os.write(writers[number % 2], b"%d\n" % number)
    finally:
        for writer in writers:
            os.close(writer)
    if (folder / "ledger").read_bytes() != b"".join(b"%d\n" % number for number in range(8)):
        raise Unlike("lines that two writers append overwrite each other")


def _link(folder: Path) -> None:
    (folder / "file").write_bytes(b"x")
    os.link(folder / "file", folder / "other")
    try:
        os.link(folder / "file", folder / "other")
    except FileExistsError:
        return
    raise Unlike("a link replaces a file")


TRIALS: Final[dict[str, Callable[[Path], None]]] = {
    "write": _write,
    "rename": _rename,
    "fsync": _sync,
    "flock": _lock,
    "append": _append,
    "link": _link,
}
