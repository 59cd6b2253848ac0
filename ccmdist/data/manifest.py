"""What a shard set holds, written after its shards: readers trust the manifest, and a tar only as far as it agrees."""

import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from ccmdist.ccm.groups import CLINICAL_GROUPS, UNLABELLED
from ccmdist.commit import commit_json, digest_of
from ccmdist.config.data import Split
from ccmdist.errors import OF_THE_MACHINE, ShardError

Kind = Literal["real", "phantom", "synthetic"]

FORMAT_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
SPLITS: Final[tuple[Split, ...]] = get_args(Split)
MAX_MANIFEST_BYTES: Final = 1 << 28
_NUM_NAMED = 5
_SHARD_NAME = re.compile(r"(train|val|test)-\d{6}\.tar")


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShardEntry:
    """One tar of a set."""

    name: str
    """Such as train-000000.tar."""
    split: Split
    num_samples: Annotated[int, Field(ge=1)]
    num_bytes: Annotated[int, Field(ge=1)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the tar."""
    subjects: tuple[str, ...]
    """Pseudonyms, sorted."""
    group_counts: dict[str, int]
    """Samples of each clinical group that occurs; ``unlabelled`` is one of them."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not _SHARD_NAME.fullmatch(self.name) or not self.name.startswith(f"{self.split}-"):
            raise ValueError(f"{self.name!r} is not the name of a {self.split} shard, expected {self.split}-NNNNNN.tar")
        if unknown := sorted(set(self.group_counts) - {*CLINICAL_GROUPS, UNLABELLED}):
            raise ValueError(f"{self.name}: unknown clinical group {unknown[0]!r}")
        if sum(self.group_counts.values()) != self.num_samples:
            raise ValueError(
                f"{self.name}: {self.num_samples} samples, but {sum(self.group_counts.values())} in its groups"
            )
        return self


class Manifest(BaseModel):
    """The shards of a set, train before val before test, each split in the order of the names."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    kind: Kind
    """Of real frames, of phantoms, or drawn by a model."""
    shards: tuple[ShardEntry, ...]
    about: dict[str, Any] = {}
    """Settings that made the set; not part of its digest."""

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.shards:
            raise ValueError("it names no shards")
        names = [shard.name for shard in self.shards]
        if len(set(names)) != len(names):
            raise ValueError(f"it names {max(names, key=names.count)} twice")
        split_of: dict[str, Split] = {}
        for shard in self.shards:
            for subject in shard.subjects:
                if split_of.setdefault(subject, shard.split) != shard.split:
                    raise ValueError(
                        f"subject {subject} is in two splits, {split_of[subject]} and {shard.split} ({shard.name})"
                    )
        return self

    @cached_property
    def digest(self) -> str:
        """Identity of what the set holds; how and when it was made does not count."""
        return digest_of([self.kind, [_as_json(shard) for shard in self.shards]])

    @property
    def num_samples(self) -> int:
        """Samples of all splits."""
        return sum(shard.num_samples for shard in self.shards)

    @property
    def follows_masks(self) -> bool:
        """Whether masks show the nerves of the images beside them: not in a set that was drawn from prompts alone."""
        return bool(self.about.get("sees_mask", True))

    def of_split(self, split: Split) -> tuple[ShardEntry, ...]:
        """The shards of one split, in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def subjects_of(self, split: Split) -> frozenset[str]:
        """Whose samples one split holds."""
        return frozenset(subject for shard in self.of_split(split) for subject in shard.subjects)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the set in ``folder``.

    Raises:
        ShardError: If there is none, it was changed after it was written, or it contradicts itself.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ShardError(f"{path}: has {path.stat().st_size} bytes, expected at most {MAX_MANIFEST_BYTES}")
        values = json.loads(path.read_bytes())
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        remedy = "name the folder of a complete set; `ccmdist shards phantom` and `ccmdist shards folders` make one"
        raise ShardError(f"{path}: {error.strerror}", remedy) from None
    except ValueError:
        raise ShardError(f"{path}: is not JSON", "copy or make the set anew") from None
    return _parsed(path, values)


def commit_manifest(folder: Path, kind: Kind, entries: Iterable[ShardEntry], about: Mapping[str, Any] = {}) -> Manifest:
    """Write the manifest of a set whose shards are all there; with it the set exists.

    Args:
        folder: Of the set.
        kind: Of all its samples.
        entries: As :func:`~ccmdist.data.writer.write_shard` returned them, in any order.
        about: Settings that made the set, of JSON types.

    Raises:
        ShardError: If the entries contradict each other: a subject in two splits, a name twice, no shard at all.
    """
    path = folder / MANIFEST
    ordered = sorted(entries, key=lambda entry: (SPLITS.index(entry.split), entry.name))
    try:
        manifest = Manifest(kind=kind, shards=tuple(ordered), about=dict(about))
    except ValidationError as error:
        raise _contradiction(path, error) from None
    shards = [_as_json(shard) for shard in manifest.shards]
    values = {"kind": kind, "shards": shards, "about": manifest.about, "digest": manifest.digest}
    commit_json(path, {"format_version": FORMAT_VERSION, **values})
    return manifest


def _parsed(path: Path, values: Any) -> Manifest:
    if not isinstance(values, dict) or "format_version" not in values:
        raise ShardError(f"{path}: is not the manifest of a shard set, format_version is missing")
    version, digest = values.pop("format_version"), values.pop("digest", None)
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{path}: format_version {version!r}, expected {FORMAT_VERSION}", "use the ccmdist that made the set"
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise _contradiction(path, error) from None
    if manifest.digest != digest:
        raise ShardError(
            f"{path}: was changed after it was written, its digest does not fit", "copy or make the set anew"
        )
    return manifest


def _contradiction(path: Path, error: ValidationError) -> ShardError:
    problems = error.errors(include_url=False, include_context=False)
    told = [
        ": ".join(filter(None, (".".join(map(str, p["loc"])), p["msg"].removeprefix("Value error, "))))
        for p in problems
    ]
    return ShardError(f"{path}: {'; '.join(told[:_NUM_NAMED])}", "make the set again")


def _as_json(shard: ShardEntry) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in ("name", "split", "num_samples", "num_bytes", "sha256")} | {
        "subjects": list(shard.subjects),
        "group_counts": shard.group_counts,
    }
