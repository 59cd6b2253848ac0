"""The transformer's files on this node's own disk: copied once, by one process, for all ranks of the node.

What it saves depends on the site. On one machine the page cache already gives one read of the file system for all its
ranks, since each reads its own share once (measured: benchmarks/sharded_load.py). A copy pays where the next start
finds it there again, or where a file system does not cache.

Imports no torch.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from ccmdist.commit import digest_of, make_folder, sync_file, sync_folder, temporary_name
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
    held = place / f"model-{base_digest[:16]}"
    files = sorted(file for file in (folder.path / "transformer").iterdir() if file.is_file())
    with alone_on_node(place, "model", "a copy of the transformer"):
        if not _is_whole(held, files):
            num_bytes = sum(file.stat().st_size for file in files)
            shutil.rmtree(held, ignore_errors=True)
            make_room(place, num_bytes, "a copy of the transformer", "set data.stage_model=false", NAMES)
            _copy(folder, held, files, base_digest, num_bytes)
        path = _with_all_else(folder, held)
    log.info("%s: the transformer is read from there", held)
    return replace(folder, path=path)


def _is_whole(path: Path, files: list[Path]) -> bool:
    """Whether the copy, which appears at once or not at all, still has all files in their full size."""
    copies = [path / "transformer" / file.name for file in files]
    return all(c.is_file() and c.stat().st_size == f.stat().st_size for c, f in zip(copies, files, strict=True))


def _with_all_else(folder: ModelFolder, held: Path) -> Path:
    """A folder of links to the copy and to all else of ``folder``; models that share a transformer have one each."""
    path = held / f"of-{digest_of(str(folder.path.resolve()))[:16]}"
    make_folder(path)
    places = {other.name: other for other in folder.path.iterdir()} | {"transformer": held / "transformer"}
    for name, place in ((name, place.resolve()) for name, place in places.items()):
        link = path / name
        if not link.is_symlink() or link.readlink() != place:
            link.unlink(missing_ok=True)
            link.symlink_to(place)
    return path


def _copy(folder: ModelFolder, held: Path, files: list[Path], base_digest: str, num_bytes: int) -> None:
    start, temporary = time.monotonic(), temporary_name(held)
    make_folder(temporary / "transformer")
    try:
        for file in tracked(files, "files of the transformer", len(files)):
            shutil.copyfile(file, target := temporary / "transformer" / file.name)
            sync_file(target)
        found = replace(folder, path=temporary).transformer_digest()
        if found != base_digest:
            raise ModelError(
                f"{held}: the copy is {found[:12]}, expected {base_digest[:12]} as in {folder.path}",
                "see that nobody writes to the model, and run the same command again",
            )
        temporary.rename(held)
        sync_folder(held.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: %.1f GiB copied in %.1f s", held, num_bytes / GIB, time.monotonic() - start)
