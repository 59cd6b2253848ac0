"""What extractors see in the images of a shard, extracted once: features, and distances to the frame of the mask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.skeleton import Floats
from ccmdist.commit import digest_of
from ccmdist.data.manifest import ShardEntry
from ccmdist.data.triple import Triple
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.distances import Features
from ccmdist.evaluation.fidelity.extractors import FeatureExtractor, PatchExtractor, chosen
from ccmdist.evaluation.fidelity.paired import blurred
from ccmdist.evaluation.sets import ImageSet, OpenedSets, SourceFrames
from ccmdist.evaluation.stored import FEATURES, commit_numbers, read_numbers, stored_path
from ccmdist.evaluation.work import Unit


class Reading(Protocol):
    """What is read off every image of a shard, with what it takes to read it."""

    @property
    def identity(self) -> list[Any]:
        """Other identities make other files."""
        ...

    @property
    def name(self) -> str:
        """Of the extractor."""
        ...

    def read(self, triples: Sequence[Triple]) -> Floats:
        """(N, ...) numbers, a row per image."""
        ...


@dataclass(frozen=True)
class SeenFeatures:
    """The features of each image, (N, D)."""

    extractor: FeatureExtractor
    batch_size: int

    @property
    def name(self) -> str:
        """See :class:`Reading`."""
        return self.extractor.name

    @property
    def identity(self) -> list[Any]:
        """See :class:`Reading`."""
        return ["features", self.extractor.sha256]

    def read(self, triples: Sequence[Triple]) -> Floats:
        """See :class:`Reading`."""
        images = np.stack([triple.image for triple in triples])
        return _in_batches(self.extractor.features, self.batch_size, images)


@dataclass(frozen=True)
class SeenDistances:
    """The perceptual distance of each image to the real frame of its mask, or of a real frame to its own blur, (N,).

    Attributes:
        extractor: Sees both.
        batch_size: Pairs that are seen at once.
        sources: The real frames; None while the real set itself is read.
    """

    extractor: PatchExtractor
    batch_size: int
    sources: SourceFrames | None = None

    @property
    def name(self) -> str:
        """See :class:`Reading`."""
        return self.extractor.name

    @property
    def identity(self) -> list[Any]:
        """See :class:`Reading`."""
        return ["perceptual", self.extractor.sha256, self.sources.identity if self.sources else ""]

    def read(self, triples: Sequence[Triple]) -> Floats:
        """See :class:`Reading`; NaN for an image whose mask is not of the real split."""
        counterparts = [self._counterpart(triple) for triple in triples]
        pairs = [(t.image, other) for t, other in zip(triples, counterparts, strict=True) if other is not None]
        found = np.full(len(triples), np.nan)
        if pairs:
            first, second = (np.stack(images) for images in zip(*pairs, strict=True))
            is_paired = np.array([other is not None for other in counterparts])
            found[is_paired] = _in_batches(self.extractor.perceptual_distance, self.batch_size, first, second)
        return found

    def _counterpart(self, triple: Triple) -> NDArray[np.uint8] | None:
        if self.sources is None:
            return blurred(triple.image)
        source = self.sources.of(triple)
        return source.image if source else None


def _in_batches(see: Callable[..., Floats], batch_size: int, *images: NDArray[np.uint8]) -> Floats:
    starts = range(0, len(images[0]), batch_size)
    return np.concatenate([see(*(one[start : start + batch_size] for one in images)) for start in starts])


@dataclass(frozen=True)
class ExtractUnit:
    """Reading one shard of a set.

    Attributes:
        images: The set.
        entry: The shard.
        shape: Height and width at which all sets are compared.
        reading: What is read.
        folder: Where the files lie.
    """

    images: ImageSet
    entry: ShardEntry
    shape: tuple[int, int]
    reading: Reading
    folder: Path

    def is_done(self) -> bool:
        """Whether it has been read."""
        return read_numbers(self._path) is not None

    def run(self) -> None:
        """Read it.

        Raises:
            EvaluationError: If the extractor cannot be used, or sees something that is no number.
            ShardError: If the shard is damaged.
        """
        self.result()

    def result(self) -> Features:
        """What was read, now or by an earlier run, in the order of the shard; values of one number have shape (N,)."""
        if (stored := read_numbers(self._path)) is not None:
            values, about = stored
            return Features(values, np.array(about["subjects"]))
        triples = list(self.images.triples(self.entry, self.shape))
        found = Features(self.reading.read(triples), np.array([triple.meta.subject for triple in triples]))
        if np.isinf(found.values).any() or (found.values.ndim > 1 and np.isnan(found.values).any()):
            raise EvaluationError(
                f"{self.images.folder / self.entry.name}: {self.reading.name} sees features that are no numbers",
                "its weights are damaged or of another model",
            )
        commit_numbers(self._path, found.values, {"subjects": found.subjects.tolist()})
        return found

    @property
    def _path(self) -> Path:
        identity = digest_of([self.reading.identity, self.entry.sha256, self.shape])
        stem = self.entry.name.removesuffix(".tar")
        return stored_path(self.folder, f"{stem}-{self.reading.name}", identity, "safetensors")


@dataclass(frozen=True)
class Extraction:
    """All that one extractor reads."""

    extractor: FeatureExtractor
    real: tuple[ExtractUnit, ...]
    synthetic: dict[str, tuple[ExtractUnit, ...]]
    """By the name of the set."""
    real_blur: tuple[ExtractUnit, ...] = ()
    """Perceptual distances of real frames to their own blur; none of an extractor that sees no patches."""
    to_source: dict[str, tuple[ExtractUnit, ...]] = field(default_factory=dict)
    """Those of images to the frame of their mask."""

    @property
    def units(self) -> list[Unit]:
        """All of them, in one order."""
        of_sets = [*self.synthetic.values(), *self.to_source.values()]
        return [*self.real, *self.real_blur, *(unit for units in of_sets for unit in units)]


def extractions(sets: OpenedSets) -> list[Extraction]:
    """What every extractor of the settings reads; reads nothing yet.

    Raises:
        EvaluationError: If weights are not where the settings say.
    """
    return [_extraction(sets, extractor) for extractor in chosen(sets.config.extractors)]


def _extraction(sets: OpenedSets, extractor: FeatureExtractor) -> Extraction:
    folder, batch_size = sets.config.out / FEATURES, sets.config.extractors.batch_size

    def units_of(images: ImageSet, reading: Reading) -> tuple[ExtractUnit, ...]:
        return tuple(ExtractUnit(images, entry, sets.shape, reading, folder) for entry in images.shards)

    seen = SeenFeatures(extractor, batch_size)
    features = units_of(sets.real, seen), {one.name: units_of(one, seen) for one in sets.synthetic}
    if not isinstance(extractor, PatchExtractor):
        return Extraction(extractor, *features)
    to_source = SeenDistances(extractor, batch_size, SourceFrames(sets.real, sets.shape))
    return Extraction(
        extractor,
        *features,
        real_blur=units_of(sets.real, SeenDistances(extractor, batch_size)),
        to_source={one.name: units_of(one, to_source) for one in sets.synthetic},
    )


def units(sets: OpenedSets) -> list[Unit]:
    """Extracting the features of every shard of every set with every extractor of the settings.

    Raises:
        EvaluationError: If weights are not where the settings say.
    """
    return [unit for one in extractions(sets) for unit in one.units]


def together(units: Sequence[ExtractUnit]) -> Features:
    """What was read off all shards of a set, in the order of the set."""
    parts = [unit.result() for unit in units]
    return Features(np.concatenate([part.values for part in parts]), np.concatenate([part.subjects for part in parts]))
