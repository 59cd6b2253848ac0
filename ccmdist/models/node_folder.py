"""A folder on this node's own disk that belongs to this user alone: what is kept there is read as if it were weights.

Imports no torch.
"""

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import filelock

from ccmdist.commit import left_overs
from ccmdist.console import log
from ccmdist.errors import OF_THE_MACHINE, ModelError

VARIABLE: Final = "CCMDIST_NODE_TMP"
"""Environment variable that names the folder above; slurm/env.sh sets it."""
REMEDY: Final = f"set {VARIABLE} to a folder on this node that you can write and nobody else"
WORTH_TELLING_BYTES: Final = 1 << 30
GIB: Final = 1 << 30
SECONDS_IN_SILENCE: Final = 5.0
RESERVE_BYTES: Final = 256 << 20
"""Left free for everybody else on the node."""


def node_folder() -> Path:
    """The folder, made if need be.

    Raises:
        ModelError: If somebody else could have put files there.
    """
    folder = Path(os.environ.get(VARIABLE) or tempfile.gettempdir()) / f"ccmdist-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise ModelError(f"{folder}: cannot be made ({error.strerror})", REMEDY) from None
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        kind = f"belongs to user {found.st_uid}" if stat.S_ISDIR(found.st_mode) else "is no folder"
        raise ModelError(
            f"{folder}: {kind}, expected a folder of user {os.getuid()}",
            REMEDY,
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


@contextlib.contextmanager
def alone_on_node(folder: Path, name: str, what: str) -> Iterator[None]:
    """Let one process of the node at a time into the body; the kernel frees the place of one that dies.

    Args:
        folder: From :func:`node_folder`.
        name: Of the lock.
        what: What is done in the body, for those who wait.
    """
    lock = filelock.FileLock(folder / f"{name}.lock", mode=0o600, fallback_to_soft=False)
    try:
        lock.acquire(timeout=SECONDS_IN_SILENCE)
    except filelock.Timeout:
        log.info("%s: waiting for another process of this node, for it is making %s", folder, what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def make_room(folder: Path, num_bytes: int, what: str, remedy: str, pattern: str) -> None:
    """See that the disk can take ``num_bytes`` more; tell what of the kind lies there already.

    Call it in :func:`alone_on_node`: it removes what a process that was killed had begun.

    Args:
        folder: From :func:`node_folder`.
        num_bytes: What is to be written.
        what: What is to be written, in words.
        remedy: What else can be done.
        pattern: Of the names of files of this kind.

    Raises:
        ModelError: If it cannot.
    """
    for left_over in left_overs(folder, pattern):
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
    others = list(folder.glob(pattern))
    # Links are not followed: what they lead to may be gone.
    held = sum(file.lstat().st_size for other in others for file in (other.rglob("*") if other.is_dir() else [other]))
    free = shutil.disk_usage(folder).free
    if free < num_bytes + RESERVE_BYTES:
        beside = f"; earlier ones hold {held / GIB:.1f} GiB there" if others else ""
        raise ModelError(
            f"{folder}: has {free / GIB:.1f} GiB free, expected {(num_bytes + RESERVE_BYTES) / GIB:.1f} GiB for "
            f"{what}{beside}",
            f"remove what is there, set {VARIABLE} to a folder on another disk of this node, or {remedy}",
        )
    if others and held >= WORTH_TELLING_BYTES:
        log.info("%s: earlier ones hold %.1f GiB; remove those that no run needs", folder, held / GIB)
