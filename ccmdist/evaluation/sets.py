"""The sets that are compared: what may stand on which side, and frames brought to one size."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isclose
from pathlib import Path
from typing import Final

from ccmdist.config.data import Split
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.data.manifest import MANIFEST, SPLITS, Manifest, ShardEntry, read_manifest
from ccmdist.data.reader import read_keys, read_shard
from ccmdist.data.triple import Triple
from ccmdist.data.views import FLIPS, flipped, resized
from ccmdist.errors import EvaluationError

PIXEL_TOLERANCE: Final = 0.01
"""Within which pixels of two sets are of one size, as a fraction: a third of the smallest default margin."""
PROVENANCE: Final = (
    "source_key",
    "source_set_digest",
    "seed",
    "adapter_digest",
    "base_digest",
    "denoise_steps",
    "guidance_scale",
)
"""What a synthetic sample has to say about its origin to be evaluated."""


@dataclass(frozen=True)
class ImageSet:
    """One split of a shard set, under the name that the report gives it."""

    name: str
    folder: Path
    manifest: Manifest
    split: Split

    @property
    def shards(self) -> tuple[ShardEntry, ...]:
        """Of the split; at least one."""
        return self.manifest.of_split(self.split)

    @property
    def subjects(self) -> frozenset[str]:
        """Whose images they are; of synthetic ones, whose masks."""
        return self.manifest.subjects_of(self.split)

    def triples(self, entry: ShardEntry, shape: tuple[int, int]) -> Iterator[Triple]:
        """The samples of one shard at the size that all sets are compared at.

        Args:
            entry: One of :attr:`shards`.
            shape: Height and width; frames of a real set are scaled to it.

        Raises:
            EvaluationError: If a synthetic frame has another size or says too little about its origin, or a real
                frame cannot be scaled.
            ShardError: If the shard is damaged.
        """
        for triple in read_shard(self.folder, entry):
            where = f"{self.folder / entry.name}: sample {triple.key}"
            if self.manifest.kind == "synthetic":
                _check_origin(triple, where)
                if triple.image.shape != shape:
                    raise EvaluationError(
                        f"{where} is {_size(triple.image.shape)}, expected {_size(shape)} as other synthetic images",
                        "evaluate sets of different sizes one by one",
                    )
            yield scaled(triple, shape, where)


@dataclass(frozen=True)
class OpenedSets:
    """All that is compared: what every pillar of the evaluation starts from."""

    config: EvaluateConfig
    real: ImageSet
    """The split that synthetic images are compared with."""
    synthetic: tuple[ImageSet, ...]
    shape: tuple[int, int]
    """Height and width of the synthetic images, to which frames of the real set are scaled."""

    @property
    def training(self) -> ImageSet | None:
        """What generators may have been trained on; None if the real set has no train split."""
        return self.of_split("train")

    def of_split(self, split: Split) -> ImageSet | None:
        """Another split of the real set; None if it is empty."""
        return replace(self.real, split=split) if self.real.manifest.of_split(split) else None


def open_sets(config: EvaluateConfig) -> OpenedSets:
    """The sets of an evaluation; reads manifests and one image of each set.

    Raises:
        EvaluationError: If the sets cannot be compared: wrong kind, empty split, different sizes or pixels.
    """
    real, synthetic = real_set(config), synthetic_sets(config)
    shape = common_shape(synthetic)
    _refuse_other_pixels(synthetic, SourceFrames(real, shape))
    return OpenedSets(config, real, tuple(synthetic), shape)


def _refuse_other_pixels(synthetic: list[ImageSet], sources: "SourceFrames") -> None:
    """Look at the first image of each set, so that an array does not measure for an hour what cannot be compared."""
    for one in synthetic:
        triple = next(read_shard(one.folder, one.shards[0]))
        source = sources.of(triple)
        if source is not None and not isclose(triple.meta.um_per_px, source.meta.um_per_px, rel_tol=PIXEL_TOLERANCE):
            raise EvaluationError(
                f"synthetic.{one.name}: sample {triple.key} has {triple.meta.um_per_px:.4f} um per px, "
                f"the real frame of its mask {source.meta.um_per_px:.4f} at this size",
                "compare it with the set whose masks it was drawn from, or correct um_per_px and pack that set again",
            )


def real_set(config: EvaluateConfig) -> ImageSet:
    """The reference: real frames, or phantoms.

    Raises:
        EvaluationError: If there is none, it is synthetic, or its split is empty.
    """
    found = _opened("real", config.real, config.split, "`ccmdist shards folders` or `ccmdist shards phantom` makes one")
    if found.manifest.kind == "synthetic":
        raise EvaluationError(
            f"real: {config.real} is a synthetic set, expected real frames or phantoms",
            "name the set that the synthetic one is to be compared with, such as the one its masks came from",
        )
    return found


def synthetic_sets(config: EvaluateConfig) -> list[ImageSet]:
    """What is compared with the reference.

    Raises:
        EvaluationError: If one is missing, is not synthetic, has no images in the split, or is named twice.
    """
    found = []
    for name, folder in config.synthetic.items():
        one = _opened(f"synthetic.{name}", folder, config.split, "`ccmdist synthesize` makes one")
        refuse_undrawn(f"synthetic.{name}", folder, one.manifest)
        found.append(replace(one, name=name))
    names: dict[str, str] = {}
    for one in found:
        if (other := names.setdefault(one.manifest.digest, one.name)) != one.name:
            raise EvaluationError(
                f"synthetic.{other} and synthetic.{one.name} hold the same images",
                "name each set once; a set drawn anew with another seed is another set",
            )
    return found


def refuse_undrawn(setting: str, folder: Path, manifest: Manifest) -> None:
    """Check that a set was drawn by a model.

    Raises:
        EvaluationError: If it was not.
    """
    if manifest.kind != "synthetic":
        raise EvaluationError(
            f"{setting}: {folder} is a {manifest.kind} set, expected one drawn by a model",
            "name the out folder of `ccmdist synthesize`; real frames and phantoms belong in `real`",
        )


def common_shape(sets: list[ImageSet]) -> tuple[int, int]:
    """Height and width of the synthetic frames, at which all sets are compared.

    Raises:
        EvaluationError: If two sets differ.
    """
    shapes = {}
    for one in sets:
        height, width = next(read_shard(one.folder, one.shards[0])).image.shape
        shapes[one.name] = (height, width)
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{name} {_size(shape)}" for name, shape in shapes.items())
        raise EvaluationError(f"synthetic sets differ in size: {told}", "evaluate them one by one")
    return next(iter(shapes.values()))


def scaled(triple: Triple, shape: tuple[int, int], where: str) -> Triple:
    """The sample at another size, showing the same field of view; itself where it has that size already.

    Raises:
        EvaluationError: If either is not square.
    """
    height, width = triple.image.shape
    if (height, width) == shape:
        return triple
    if height != width or shape[0] != shape[1]:
        raise EvaluationError(
            f"{where} is {_size((height, width))} and cannot be compared with images of {_size(shape)}",
            "pack square frames, or synthesize at the size of the real ones",
        )
    size_px = shape[0]
    meta = replace(triple.meta, um_per_px=triple.meta.um_per_px * height / size_px)
    return replace(resized(triple, size_px), meta=meta)


class SourceFrames:
    """The real frames by the key that a synthetic sample names as its source; flipped views are flipped again."""

    def __init__(self, real: ImageSet, shape: tuple[int, int]) -> None:
        """Read nothing yet."""
        self._real, self._shape = real, shape
        self._entries = {entry.name: entry for entry in real.shards}
        # Synthetic shards follow the order of their sources, so the last few shards are all that is asked for.
        self._triples = lru_cache(maxsize=2)(self._loaded)

    @property
    def identity(self) -> str:
        """Other frames have another one."""
        return f"{self._real.manifest.digest}/{self._real.split}"

    def of(self, triple: Triple) -> Triple | None:
        """The frame whose mask a synthetic sample was drawn from, or None if it is not in the split."""
        return self.find(_source_key(triple))

    def find(self, source_key: str) -> Triple | None:
        """The frame, or None if it is not in the split."""
        key, flip = self._parted(source_key)
        if key not in self._shard_of:
            return None
        frame = self._triples(self._shard_of[key])[key]
        return flipped(frame, flip) if flip else frame

    def of_another(self, triple: Triple) -> Triple | None:
        """The next frame of another subject in the shard of the frame that a synthetic sample was drawn from.

        None if that frame is not in the split, or all of its shard are of one subject.
        """
        key, _ = self._parted(_source_key(triple))
        if key not in self._shard_of:
            return None
        frames = list(self._triples(self._shard_of[key]).values())
        at = next(number for number, frame in enumerate(frames) if frame.key == key)
        others = (frame for frame in [*frames[at:], *frames[:at]] if frame.meta.subject != frames[at].meta.subject)
        return next(others, None)

    def _parted(self, source_key: str) -> tuple[str, str]:
        """The key of a frame, and the flip of which it is a view; empty if it is the frame itself."""
        key, _, flip = source_key.rpartition("-")
        return (key, flip) if flip in FLIPS and source_key not in self._shard_of else (source_key, "")

    @cached_property
    def _shard_of(self) -> dict[str, str]:
        """The shard of each key, off the headers of the tars: a worker of an array does not measure them all."""
        return {key: entry.name for entry in self._real.shards for key in read_keys(self._real.folder, entry)}

    def _loaded(self, shard: str) -> dict[str, Triple]:
        return {triple.key: triple for triple in self._real.triples(self._entries[shard], self._shape)}


def _source_key(triple: Triple) -> str:
    """What a synthetic sample names as its source; empty if it names none."""
    return str((triple.meta.provenance or {}).get("source_key", ""))


def _opened(setting: str, folder: Path, split: Split, remedy: str) -> ImageSet:
    if not (folder / MANIFEST).is_file():
        raise EvaluationError(f"{setting}: {folder} holds no shard set (no {MANIFEST})", remedy)
    manifest = read_manifest(folder)
    if not manifest.of_split(split):
        others = ", ".join(other for other in SPLITS if manifest.of_split(other))
        raise EvaluationError(f"{setting}: {folder} has no samples in split {split}", f"set split to one of: {others}")
    return ImageSet(setting, folder, manifest, split)


def _check_origin(triple: Triple, where: str) -> None:
    provenance = triple.meta.provenance or {}
    if missing := [name for name in PROVENANCE if name not in provenance]:
        raise EvaluationError(
            f"{where}: its provenance does not say {', '.join(missing)}", "draw the set again with `ccmdist synthesize`"
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) + " px"
