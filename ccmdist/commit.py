"""The one way in which files and folders appear on disk: complete or not at all, also after a power cut.

Written under a temporary name beside the target, flushed to the disk, renamed, and the rename itself flushed.
Neither torch, safetensors nor json ever calls fsync, so nothing that must survive is written by them directly.
Python tells its audit hooks of every file that is opened, renamed or removed; flushes are told here, for drills.
"""

import contextlib
import hashlib
import json
import os
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync_file(path: Path) -> None:
    """Flush the contents of one file to the disk."""
    sys.audit("ccmdist.sync", str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush a folder's entries (new names, renames) to the disk."""
    sys.audit("ccmdist.sync", str(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; once it is made, a power cut does not take it away again."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` that no other process uses and that no reader mistakes for a result."""
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def left_overs(folder: Path, names: str = "*") -> list[Path]:
    """What processes that were killed have left under temporary names; of targets whose names have this pattern."""
    return list(folder.glob(f".{names}.tmp-*"))


@contextlib.contextmanager
def committed_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it becomes ``path``, on an error it is removed."""
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            # safetensors makes files that only their owner may read; a model or a cache is often shared by a group.
            temporary.chmod(stat.S_IMODE(mode))
        sync_file(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def commit_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, completely or not at all."""
    with committed_file(path) as temporary:
        temporary.write_bytes(data)


def commit_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8, completely or not at all."""
    commit_bytes(path, text.encode())


def commit_json(path: Path, value: Any) -> None:
    """Write ``value`` to ``path`` as indented JSON with sorted keys, completely or not at all."""
    commit_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sha256_of_file(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-serialisable value, in hexadecimal; equal values give equal digests on every machine."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
