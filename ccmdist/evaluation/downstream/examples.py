"""The pixels and labels of the images that a network learns from or is tested on, at the size of the networks."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import sample as phantom
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple
from ccmdist.data.views import resized_image, resized_mask
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.downstream.choice import Chosen
from ccmdist.evaluation.downstream.folds import Sample, Source

NO_GROUP: Final = len(CLINICAL_GROUPS)
"""Label of an image whose clinical group is not known."""
SHARDS_REMEMBERED: Final = 48
"""Cells of the grid share their images, and a worker does several of them."""
PHANTOMS_REMEMBERED: Final = 4096
PHANTOM_PX: Final = (64, 1024)
"""Smallest and largest edge of a phantom."""


@dataclass(frozen=True)
class Examples:
    """Images in one order."""

    images: NDArray[np.uint8]
    """(N, H, W), grey."""
    masks: NDArray[np.bool_]
    """(N, H, W), True on nerves."""
    labels: NDArray[np.int64]
    """(N,): place of the clinical group in CLINICAL_GROUPS, or NO_GROUP."""

    def __len__(self) -> int:
        return len(self.labels)


def real_examples(source: Source, samples: Sequence[Sample], size_px: int) -> Examples:
    """Images of a set, in the order of ``samples``.

    Raises:
        EvaluationError: If a frame is not square.
        ShardError: If a shard is damaged.
    """
    return _stacked(_loaded(source, samples, size_px))


def training_examples(chosen: Chosen, real: Source, size_px: int, seed: int, shuffle: int | None = None) -> Examples:
    """All images of an arm: real ones, synthetic ones, phantoms.

    Args:
        chosen: What to train on.
        real: Set of the real ones.
        size_px: Edge of the images.
        seed: Of the evaluation; draws phantoms, the same in every fold.
        shuffle: Seed that deals the labels and the masks of all but the real images out anew; None leaves them.

    Raises:
        EvaluationError: If a frame is not square.
        ShardError: If a shard is damaged.
    """
    made = [*_loaded(chosen.source, chosen.synthetic, size_px)] if chosen.source else []
    made += _phantoms(chosen, frame_px(real), size_px, seed)
    if shuffle is not None:
        made = _dealt_anew(made, shuffle)
    return _stacked([*_loaded(real, chosen.real, size_px), *made])


Pixels = tuple[NDArray[np.uint8], NDArray[np.bool_], int]


def _dealt_anew(made: list[Pixels], seed: int) -> list[Pixels]:
    """Each image with the mask and the label of another one."""
    order = np.random.default_rng(seed).permutation(len(made))
    return [(image, made[other][1], made[other][2]) for (image, _, _), other in zip(made, order, strict=True)]


def _stacked(frames: Iterable[Pixels]) -> Examples:
    images, masks, labels = zip(*frames, strict=True)
    return Examples(np.stack(images), np.stack(masks), np.array(labels, np.int64))


def _loaded(source: Source, samples: Sequence[Sample], size_px: int) -> list[Pixels]:
    shards = {one.shard for one in samples}
    found: dict[str, Pixels] = {}
    for entry in source.manifest.shards:
        if entry.name in shards:
            found |= _shard(source.folder, entry.name, entry.sha256, size_px)
    return [found[one.key] for one in samples]


@lru_cache(maxsize=SHARDS_REMEMBERED)
def _shard(folder: Path, name: str, sha256: str, size_px: int) -> dict[str, Pixels]:
    """The images of a shard by key; remembered as long as the shard is the same."""
    entry = next(entry for entry in read_manifest(folder).shards if (entry.name, entry.sha256) == (name, sha256))
    return {triple.key: _pixels(triple, size_px, folder) for triple in read_shard(folder, entry)}


def _pixels(triple: Triple, size_px: int, folder: Path) -> Pixels:
    height, width = triple.image.shape
    if height != width:
        raise EvaluationError(
            f"{folder}: sample {triple.key} is {height}x{width} px, expected a square", "crop it before packing"
        )
    group = triple.meta.clinical_group
    label = NO_GROUP if group is None else CLINICAL_GROUPS.index(group)
    return resized_image(triple.image, size_px), resized_mask(triple.nerve_mask, size_px), label


def frame_px(source: Source) -> int:
    """Edge of a set's frames, before they are resized."""
    return int(next(read_shard(source.folder, source.manifest.shards[0])).image.shape[0])


def _phantoms(chosen: Chosen, frame_px: int, size_px: int, seed: int) -> list[Pixels]:
    # Drawn for this alone: a reference set that consists of phantoms must not be met again in training.
    fresh = int.from_bytes(hashlib.sha256(f"downstream phantoms/{seed}".encode()).digest()[:6])
    edge = min(max(frame_px, PHANTOM_PX[0]), PHANTOM_PX[1])
    return [
        _phantom(fresh, group, number, edge, size_px) for group, num in chosen.num_phantoms for number in range(num)
    ]


@lru_cache(maxsize=PHANTOMS_REMEMBERED)
def _phantom(seed: int, group: ClinicalGroup, number: int, frame_px: int, size_px: int) -> Pixels:
    triple = phantom(seed, group, number, 0, frame_px)
    return resized_image(triple.image, size_px), resized_mask(triple.nerve_mask, size_px), CLINICAL_GROUPS.index(group)
