"""What the cache of embeddings and latents is called and what it holds; imports no torch.

A cache is a folder named by its fingerprint: all that decides its contents. Per source shard it holds one tar of
the same name and, committed after it, an index that says where each sample lies. A shard is committed when its
index is there.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.ccm.prompts import NEGATIVE_PROMPT, TEMPLATE_VERSION
from ccmdist.commit import commit_json, digest_of
from ccmdist.config.data import MIRRORS, USUAL, DataSettings, Flip, PrecomputeConfig
from ccmdist.config.loading import flat, resolved
from ccmdist.data.manifest import ShardEntry, read_manifest
from ccmdist.errors import CacheError, ShardError

CONTENT_VERSION = 1
"""Raised when the same settings give other contents: another rule of resizing, other views, other members."""
FINGERPRINT = "fingerprint.json"
UNKNOWN = "unknown"
NUM_NAMED = 4
DIGEST_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member of a tar lies: ``size`` bytes from ``offset`` on, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One cached sample: a sample of the shard set, or a flipped view of one."""

    key: str
    shard: str
    """Name of the tar."""
    clinical_group: ClinicalGroup | None
    subject: str
    num_text_tokens: int
    """Length of its prompt embeddings."""
    sample: Member
    """KEY.safetensors: prompt_embeds, image_latents, mask_latents; with holes, what belongs to them."""
    negative: Member
    """KEY.negative.safetensors: prompt_embeds of the negative prompt with the same mask."""
    text: Member | None = None
    """text-DIGEST.safetensors, where samples of one prompt share its embeddings; then those of the negative prompt too
    lie in such a member, and KEY.safetensors has neither."""


class ShardIndex(BaseModel):
    """What one tar of the cache holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shard: str
    num_bytes: int
    sha256: str
    entries: tuple[CacheEntry, ...]


def fingerprint(data: DataSettings, manifest_digest: str, encoders: dict[str, Any]) -> dict[str, Any]:
    """All that decides what a cache holds. Paths do not: a copy elsewhere is the same cache.

    Args:
        data: The settings that name a cache.
        manifest_digest: Of the shard set.
        encoders: Identity of the encoders, as the model folder gives it.

    Raises:
        ShardError: If views are mirrored, and whether frames to train on name an eye cannot be read.
    """
    later = {name: value for name, value in resolved(data).items() if name in USUAL}
    if not MIRRORS.isdisjoint(data.flips) and _knows_eyes(data.shards, manifest_digest):
        later |= {"eye_follows_flip": True}  # prompts of mirrored views have not always named the other eye
    return later | {
        "content_version": CONTENT_VERSION,
        "shards": manifest_digest,
        "encoders": encoders,
        "image_size_px": data.image_size_px,
        "dtype": data.dtype,
        "flips": flips(data),
        "prompt_template": TEMPLATE_VERSION,
        "negative_prompt": NEGATIVE_PROMPT,
    }


@lru_cache(maxsize=8)
def _knows_eyes(shards: Path, _manifest_digest: str) -> bool:
    """Whether a sample to train on names its eye; reads fields up to the first that does, once for each set."""
    from ccmdist.data.reader import read_metas  # which takes scipy

    train = read_manifest(shards).of_split("train")
    return any(meta.eye is not None for shard in train for _, meta in read_metas(shards, shard))


def flips(data: DataSettings) -> list[Flip]:
    """The flips of ``data``, each once and in one order: neither changes what is cached."""
    return sorted(set(data.flips))


def cache_folder(data: DataSettings, fingerprint: dict[str, Any]) -> Path:
    """Folder of the cache with this fingerprint."""
    return data.cache / digest_of(fingerprint)[:16]


def find_cache(data: DataSettings, manifest_digest: str, encoders: dict[str, Any]) -> tuple[Path, str]:
    """Folder of the cache of ``data``, and the digest of its fingerprint; arguments as of :func:`fingerprint`.

    Raises:
        CacheError: If there is none; names the nearest.
    """
    wanted = fingerprint(data, manifest_digest, encoders)
    folder = cache_folder(data, wanted)
    if read_fingerprint(folder) != wanted:
        raise _no_cache(data, wanted)
    return folder, digest_of(wanted)


def commit_fingerprint(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Write the fingerprint into its folder, once."""
    if read_fingerprint(folder) != fingerprint:
        commit_json(folder / FINGERPRINT, fingerprint)


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """The fingerprint in ``folder``; None if there is none that can be read."""
    try:
        found = json.loads((folder / FINGERPRINT).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def source_set_digest(data: DataSettings, data_digest: str) -> str:
    """Digest of the manifest whose samples a run trains on; "unknown" if what it was read from is not there any more.

    Args:
        data: The settings of the run.
        data_digest: Identity of what is trained on: of a cache, or of the shard set itself.
    """
    found = read_fingerprint(data.cache / data_digest[:16])
    if found and digest_of(found) == data_digest:  # another fingerprint would not speak for this cache
        return str(found["shards"])
    try:
        return data_digest if read_manifest(data.shards).digest == data_digest else UNKNOWN
    except (ShardError, OSError):
        return UNKNOWN


def index_path(folder: Path, shard: str) -> Path:
    """Where the index of a shard lies."""
    return folder / f"{shard.removesuffix('.tar')}.json"


def is_committed(folder: Path, shard: str) -> bool:
    """Whether the shard's index is there and fits the tar's size."""
    try:
        return bool(read_index(folder, shard).num_bytes == (folder / shard).stat().st_size)
    except (OSError, ValidationError):
        return False


def read_index(folder: Path, shard: str) -> ShardIndex:
    """The index of a shard.

    Raises:
        OSError: If there is none.
        ValidationError: If it cannot be understood.
    """
    return ShardIndex.model_validate_json(index_path(folder, shard).read_bytes())


def indexes(folder: Path, shards: Sequence[ShardEntry], data: DataSettings) -> Iterator[ShardIndex]:
    """The indexes of the shards, each compared with its tar's size and with the shard that it was made from.

    One at a time: all of them would take hundreds of bytes per sample.

    Raises:
        CacheError: If shards are missing, or an index does not fit its tar or its source.
    """
    if missing := [shard.name for shard in shards if not index_path(folder, shard.name).is_file()]:
        raise CacheError(
            f"{folder}: {len(missing)} of {len(shards)} shards are missing ({named(missing)})", f"run `{command(data)}`"
        )
    return (_checked(folder, shard, data) for shard in shards)


def _checked(folder: Path, shard: ShardEntry, data: DataSettings) -> ShardIndex:
    path, tar = index_path(folder, shard.name), folder / shard.name
    try:
        index = read_index(folder, shard.name)
        num_bytes = tar.stat().st_size
    except FileNotFoundError as error:
        raise CacheError(f"{error.filename}: is missing", f"run `{command(data)}`") from None
    except ValidationError:
        raise CacheError(f"{path}: is not an index of a cached shard", f"run `{command(data)}`") from None
    if num_bytes != index.num_bytes:
        raise CacheError(f"{tar}: has {num_bytes} bytes, expected {index.num_bytes}", f"run `{command(data)}`")
    expected = shard.num_samples * (1 + len(flips(data)) * (shard.split == "train"))
    strangers = [entry.key for entry in index.entries if entry.shard != shard.name]
    if strangers or index.shard != shard.name or len(index.entries) != expected:
        raise CacheError(
            f"{path}: lists {len(index.entries)} samples of {index.shard}, expected {expected} of {shard.name}",
            f"remove {path} and run `{command(data)}`",
        )
    return index


def _no_cache(data: DataSettings, wanted: dict[str, Any]) -> CacheError:
    """The error for a cache that does not exist, with what sets it apart from the most similar one that does."""
    others = {folder: found for folder in _folders(data.cache) if (found := read_fingerprint(folder)) is not None}
    message = f"{data.cache}: holds no cache for these settings"
    if others:
        differences = {folder: _differences(found, wanted) for folder, found in others.items()}
        nearest = min(differences, key=lambda folder: (len(differences[folder]), folder.name))
        message += f"; the nearest, {nearest.name}, differs in {named(differences[nearest])}"
    return CacheError(message, f"run `{command(data)}`")


def command(data: DataSettings) -> str:
    """The command that fills the cache of ``data``, complete in itself."""
    values = flat(resolved(PrecomputeConfig(data=data)), "")
    told = [name for name, field in DataSettings.model_fields.items() if getattr(data, name) != field.default]
    words = [
        f"{name}={_as_yaml(value)}"
        for name, value in values.items()
        if name.startswith("data.") and name.split(".")[1] in told
    ]
    return shlex.join(["ccmdist", "precompute", *words])


def named(items: Sequence[str]) -> str:
    """The first few of the items, and that there are more."""
    return ", ".join(items[:NUM_NAMED]) + (", ..." if len(items) > NUM_NAMED else "")


def _folders(cache: Path) -> list[Path]:
    return sorted(folder for folder in cache.glob("*") if folder.is_dir()) if cache.is_dir() else []


def _differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    old, new = {**USUAL, **flat(found)}, {**USUAL, **flat(wanted)}
    differing = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return [f"{name} ({_shown(old.get(name))}, expected {_shown(new.get(name))})" for name in differing]


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == DIGEST_LENGTH else text


def _as_yaml(value: Any) -> str:
    return f"[{','.join(value)}]" if isinstance(value, list) else str(value)
