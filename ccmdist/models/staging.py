"""The transformer's files on this node's own disk: copied once, by one process, for all ranks of the node.

What it saves depends on the site. On one machine the page cache already gives one read of the file system for all its
ranks, since each reads its own share once (measured: benchmarks/sharded_load.py). A copy pays where the next start
finds it there again, or where a file system does not cache.

Imports no torch.
"""

import shutil
import time
from pathlib import Path
from typing import Final

from ccmdist.commit import make_folder, sync_file, sync_folder, temporary_name
from ccmdist.console import log, tracked
from ccmdist.errors import ModelError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.node_folder import GIB, alone_on_node, make_room, node_folder

NAMES: Final = "model-*"


def staged(folder: ModelFolder, base_digest: str) -> ModelFolder:
    """The same model with its transformer on this node's disk; all else is a link to where it lies.

    Local: ranks of a node wait for the one that copies.

    Args:
        folder: On a shared file system.
        base_digest: ``folder.transformer_digest()``; that of the copy has to be the same.

    Raises:
        ModelError: If the node's disk has no room, or the copy differs.
    """
    place = node_folder()
    copy = ModelFolder(place / f"model-{base_digest[:16]}", folder.version)
    files = sorted(file for file in (folder.path / "transformer").iterdir() if file.is_file())
    with alone_on_node(place, "model", "a copy of the transformer"):
        if not _is_whole(copy.path, files):
            num_bytes = sum(file.stat().st_size for file in files)
            shutil.rmtree(copy.path, ignore_errors=True)
            make_room(place, num_bytes, "a copy of the transformer", "set data.stage_model=false", NAMES)
            _copy(folder, copy, files, base_digest, num_bytes)
    log.info("%s: the transformer is read from there", copy.path)
    return copy


def _is_whole(path: Path, files: list[Path]) -> bool:
    """Whether the copy, which appears at once or not at all, still has all files in their full size."""
    copies = [path / "transformer" / file.name for file in files]
    return all(c.is_file() and c.stat().st_size == f.stat().st_size for c, f in zip(copies, files, strict=True))


def _copy(folder: ModelFolder, copy: ModelFolder, files: list[Path], base_digest: str, num_bytes: int) -> None:
    start, temporary = time.monotonic(), temporary_name(copy.path)
    make_folder(temporary / "transformer")
    try:
        for other in folder.path.iterdir():
            if other.name != "transformer":
                (temporary / other.name).symlink_to(other.resolve())
        for file in tracked(files, "files of the transformer", len(files)):
            shutil.copyfile(file, target := temporary / "transformer" / file.name)
            sync_file(target)
        found = ModelFolder(temporary, folder.version).transformer_digest()
        if found != base_digest:
            raise ModelError(
                f"{copy.path}: the copy is {found[:12]}, expected {base_digest[:12]} as in {folder.path}",
                "see that nobody writes to the model, and run the same command again",
            )
        temporary.rename(copy.path)
        sync_folder(copy.path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: %.1f GiB copied in %.1f s", copy.path, num_bytes / GIB, time.monotonic() - start)
