"""Write shard sets. Equal samples give equal bytes: a tar holds no times and no owners."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.commit import commit_json, committed_file, left_overs, sha256_of_file
from ccmdist.config.data import Split
from ccmdist.config.loading import flat
from ccmdist.console import log
from ccmdist.data.manifest import MANIFEST, SPLITS, Kind, Manifest, ShardEntry, commit_manifest, read_manifest
from ccmdist.data.triple import Triple, members_of
from ccmdist.errors import ShardError

UNFINISHED = "unfinished.json"
"""Stands in the folder of a set while it is being written, so that a later run knows whose tars those are."""


def write_shard(folder: Path, name: str, split: Split, triples: Iterable[Triple]) -> ShardEntry:
    """Commit one tar with the samples in the given order.

    Args:
        folder: Of the set.
        name: Such as train-000000.tar.
        split: Of all its samples.
        triples: At least one.

    Raises:
        ShardError: If a sample could not be read back, or two have one key.
    """
    path = folder / name
    keys: set[str] = set()
    subjects: set[str] = set()
    group_counts: Counter[str] = Counter()
    with committed_file(path) as temporary:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for triple in triples:
                if triple.key in keys:
                    raise ShardError(f"{path}: two samples have the key {triple.key}", "give one of them another key")
                _add(tar, triple)
                keys.add(triple.key)
                subjects.add(triple.meta.subject)
                group_counts[triple.meta.clinical_group or UNLABELLED] += 1
        if not keys:
            raise ShardError(f"{path}: a shard has at least one sample, got none")
        num_bytes, sha256 = temporary.stat().st_size, sha256_of_file(temporary)
    counts = dict(sorted(group_counts.items()))
    return ShardEntry(name, split, len(keys), num_bytes, sha256, tuple(sorted(subjects)), counts)


def write_set(
    folder: Path,
    kind: Kind,
    samples: Iterable[tuple[Split, Triple]],
    samples_per_shard: int,
    about: Mapping[str, Any] = {},
) -> Manifest:
    """Write a whole set: its shards in the order of ``samples``, then its manifest.

    An interrupted run leaves no manifest, and the next one starts afresh.

    Args:
        folder: Of the set; see :func:`existing_set`.
        kind: Of all samples.
        samples: Each with its split; the splits may alternate. One shard of each split is held in memory.
        samples_per_shard: Of every shard but the last of a split.
        about: Settings that made the set, of JSON types.

    Raises:
        ShardError: If two samples have one key, or a subject is in two splits.
    """
    _start(folder)
    keys: set[str] = set()
    pending: dict[Split, list[Triple]] = {split: [] for split in SPLITS}
    entries: list[ShardEntry] = []

    def flush(split: Split) -> None:
        number = sum(entry.split == split for entry in entries)
        entries.append(write_shard(folder, f"{split}-{number:06d}.tar", split, pending[split]))
        pending[split] = []

    for split, triple in samples:
        if triple.key in keys:
            raise ShardError(f"{folder}: two samples have the key {triple.key}", "give one of them another key")
        keys.add(triple.key)
        pending[split].append(triple)
        if len(pending[split]) == samples_per_shard:
            flush(split)
    for split in SPLITS:
        if pending[split]:
            flush(split)
    manifest = commit_manifest(folder, kind, entries, about)
    (folder / UNFINISHED).unlink(missing_ok=True)
    return manifest


def existing_set(folder: Path, about: Mapping[str, Any]) -> Manifest | None:
    """The set that a run with the same settings has already completed in ``folder``; None if it is still to be made.

    Args:
        folder: Where the set is to lie.
        about: Settings of this run.

    Raises:
        ShardError: If the folder holds a set made otherwise, or tars that no run of ours was writing.
    """
    if not (folder / MANIFEST).exists():
        _refuse_strangers(folder)
        return None
    manifest = read_manifest(folder)
    old, new = flat(manifest.about), flat(dict(about))
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    if differing:
        shown = ", ".join(
            f"{name} ({old.get(name, 'absent')}, now {new.get(name, 'absent')})" for name in differing[:4]
        )
        raise ShardError(
            f"{folder}: holds a set that was made with other {shown}", "choose another out, or remove the folder"
        )
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.num_bytes:
            raise ShardError(
                f"{path}: is not the shard that its manifest names", f"remove {folder} and run the command again"
            )
    (folder / UNFINISHED).unlink(missing_ok=True)
    log.info("%s: already there, %d samples in %d shards", folder, manifest.num_samples, len(manifest.shards))
    return manifest


def shards_in(folder: Path) -> list[Path]:
    """The tars that lie in a folder, sorted by name."""
    return sorted(folder.glob("*.tar"))


def _start(folder: Path) -> None:
    """Take the folder, and clear away what an interrupted run left in it."""
    if (folder / MANIFEST).exists():
        raise ShardError(f"{folder}: holds a set already", "choose another folder, or remove it")
    _refuse_strangers(folder)
    folder.mkdir(parents=True, exist_ok=True)
    commit_json(folder / UNFINISHED, {"remark": "a set is being written here; run the same command again if it is not"})
    for path in [*shards_in(folder), *left_overs(folder, "*.tar")]:
        path.unlink()


def _refuse_strangers(folder: Path) -> None:
    if shards_in(folder) and not (folder / UNFINISHED).exists():
        raise ShardError(f"{folder}: holds tars but no {MANIFEST}", "choose an empty folder; nothing here was changed")


def _add(tar: tarfile.TarFile, triple: Triple) -> None:
    for ending, content in members_of(triple).items():
        info = tarfile.TarInfo(f"{triple.key}.{ending}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
