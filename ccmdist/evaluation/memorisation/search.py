"""The training frames that images come nearest to: searched shard by shard, for synthetic and held-out images alike.

Held-out frames are of people whom no training frame shows. How near they come to training frames is how near an image
comes by chance, and the yardstick of :mod:`~ccmdist.evaluation.memorisation.gate`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.ndimage import binary_dilation

from ccmdist.commit import commit_json, digest_of
from ccmdist.data.manifest import ShardEntry
from ccmdist.data.triple import Triple, mask_sha256
from ccmdist.data.views import FLIPS
from ccmdist.evaluation.memorisation.likeness import (
    LIKENESS_VERSION,
    Looked,
    aligned,
    coarse_likeness,
    looked,
    nearest,
    shifted_likeness,
)
from ccmdist.evaluation.sets import ImageSet, OpenedSets
from ccmdist.evaluation.stored import NEIGHBOURS, read_json, stored_path
from ccmdist.evaluation.work import Unit

SEARCH_VERSION: Final = 1
"""Raised whenever a column changes its meaning; older files are then searched anew."""
BLANK_PX: Final = 2
"""By which nerves are widened before they are blanked: masks are a little thinner than what they lie on."""
NUM_CELLS: Final = 3
MAX_COMPARED: Final = 2000
"""Images of a set among which duplicates are sought, evenly spread; more would cost the square."""


@dataclass(frozen=True)
class Neighbour:
    """One image and the training frame that it comes nearest to."""

    key: str
    subject: str
    clinical_group: str
    """Empty if it is not known."""
    nearest_key: str
    """Of the training frame."""
    ncc: float
    """Registered normalised cross-correlation with it; 1 is a copy."""
    flip: str
    turn_deg: float
    down: float
    """Of the shift, as a fraction of the edge."""
    right: float
    distance: float
    """To the training frame that is nearest at the coarse look, which need not be ``nearest_key``: 0 to 2."""
    coarse_key: str
    """Of that frame."""
    has_training_mask: bool
    """Whether its nerve mask is, pixel by pixel, that of a training frame, or a flip of it."""


@dataclass(frozen=True, eq=False)
class Frames:
    """Frames in memory, ready to be compared."""

    keys: list[str]
    subjects: list[str]
    seen: list[Looked]
    masks: frozenset[str]
    """SHA-256 of their nerve masks and of each flip of them."""

    @cached_property
    def coarse(self) -> NDArray[np.float32]:
        """Unit vectors, (frames, numbers)."""
        return np.stack([one.coarse for one in self.seen])


@dataclass(frozen=True)
class Searching:
    """How images are searched for.

    Attributes:
        sets: What is compared.
        training: The training frames.
        blank_nerves: Whether nerves do not count, as when images may share a training frame's mask.
    """

    sets: OpenedSets
    training: ImageSet
    blank_nerves: bool

    @property
    def held_out(self) -> list[ImageSet]:
        """The splits of the real set that no generator was trained on; none, one or two."""
        return [one for split in ("val", "test") if (one := self.sets.of_split(split)) is not None]

    @cached_property
    def frames(self) -> Frames:
        """The training frames; read once per process, when first asked for."""
        return self._read([self.training])

    @cached_property
    def outside(self) -> Frames:
        """The held-out frames, likewise."""
        return self._read(self.held_out)

    @cached_property
    def cells(self) -> NDArray[np.integer[Any]]:
        """The cell of image space in which each training frame lies, by k-means."""
        num_cells = min(NUM_CELLS, len(self.frames.keys))
        return kmeans2(self.frames.coarse.astype(np.float64), num_cells, minit="++", seed=0)[1]

    def neighbours(self, images: ImageSet, entry: ShardEntry) -> list[Neighbour]:
        """What is known of the images of one shard, searched for now or by an earlier run."""
        return [Neighbour(**row) for row in self._values(images, entry)["neighbours"]]

    def nearest_likeness(self, images: ImageSet) -> pd.DataFrame:
        """Of each real frame, in training or outside, the likeness of the synthetic image that comes nearest to it.

        Returns:
            Columns key, subject, is_training and likeness.
        """
        parts = [self._values(images, entry)["of_real"] for entry in images.shards]
        return pd.DataFrame(parts[0]).assign(likeness=np.max([part["likeness"] for part in parts], axis=0))

    def spacing(self) -> pd.DataFrame:
        """Of each training frame, by key: its coarse distance to the nearest other one, and its cell of image space."""
        rows = [row for entry in self.training.shards for row in self._values(self.training, entry)["spacing"]]
        return pd.DataFrame(rows).set_index("key")

    def do(self, images: ImageSet, entry: ShardEntry) -> None:
        """Search for the images of a shard, unless an earlier run has."""
        self._values(images, entry)

    def is_done(self, images: ImageSet, entry: ShardEntry) -> bool:
        """Whether the images of a shard have been searched for."""
        return read_json(self._path(images, entry)) is not None

    def _values(self, images: ImageSet, entry: ShardEntry) -> dict[str, Any]:
        path = self._path(images, entry)
        found = read_json(path)
        if found is None:
            found = self._searched(images, entry)
            commit_json(path, found)
        return found

    def _path(self, images: ImageSet, entry: ShardEntry) -> Path:
        trained = [shard.sha256 for shard in self.training.shards]
        others = [shard.sha256 for one in self.held_out for shard in one.shards]
        identity = digest_of(
            [SEARCH_VERSION, LIKENESS_VERSION, self.sets.shape, self.blank_nerves, trained, others, entry.sha256]
        )
        folder, stem = self.sets.config.out / NEIGHBOURS, entry.name.removesuffix(".tar")
        return stored_path(folder, stem, identity, "json")

    def _searched(self, images: ImageSet, entry: ShardEntry) -> dict[str, Any]:
        triples = images.triples(entry, self.sets.shape)
        if images.manifest.kind == "synthetic":
            return self._of_synthetic(triples)
        if images.split == "train":
            return {"spacing": list(self._spacing(triples))}
        return {"neighbours": [asdict(self._neighbour(triple, self._look(triple))[0]) for triple in triples]}

    def _of_synthetic(self, triples: Iterator[Triple]) -> dict[str, Any]:
        rows, best = [], np.full(len(self.frames.keys) + len(self.outside.keys), -1.0)
        for triple in triples:
            seen = self._look(triple)
            neighbour, likeness = self._neighbour(triple, seen)
            rows.append(asdict(neighbour))
            outside = [coarse_likeness(seen, self.outside.coarse)[0]] if self.outside.keys else []
            best = np.maximum(best, np.concatenate([likeness, *outside]))
        num_training, num_outside = len(self.frames.keys), len(self.outside.keys)
        of_real = {
            "key": [*self.frames.keys, *self.outside.keys],
            "subject": [*self.frames.subjects, *self.outside.subjects],
            "is_training": [True] * num_training + [False] * num_outside,
            "likeness": [round(float(value), 6) for value in best],
        }
        return {"neighbours": rows, "of_real": of_real}

    def _neighbour(self, triple: Triple, seen: Looked) -> tuple[Neighbour, NDArray[np.float32]]:
        likeness, variant = coarse_likeness(seen, self.frames.coarse)
        match = nearest(seen, self.frames.seen, likeness, variant)
        first = int(likeness.argmax())
        found = Neighbour(
            key=triple.key,
            subject=triple.meta.subject,
            clinical_group=triple.meta.clinical_group or "",
            nearest_key=self.frames.keys[match.index],
            ncc=round(match.ncc, 6),
            flip=match.flip,
            turn_deg=match.turn_deg,
            down=match.shift[0],
            right=match.shift[1],
            distance=distance_of(float(likeness[first])),
            coarse_key=self.frames.keys[first],
            has_training_mask=mask_sha256(triple.nerve_mask) in self.frames.masks,
        )
        return found, likeness

    def _spacing(self, triples: Iterator[Triple]) -> Iterator[dict[str, Any]]:
        place = {key: number for number, key in enumerate(self.frames.keys)}
        for triple in triples:
            likeness = coarse_likeness(self._look(triple), self.frames.coarse)[0]
            likeness[place[triple.key]] = -1
            cell = int(self.cells[place[triple.key]])
            yield {"key": triple.key, "distance": distance_of(float(likeness.max())), "cell": cell}

    def _read(self, parts: Sequence[ImageSet]) -> Frames:
        keys, subjects, seen, masks = [], [], [], set[str]()
        for one in parts:
            for entry in one.shards:
                for triple in one.triples(entry, self.sets.shape):
                    keys.append(triple.key)
                    subjects.append(triple.meta.subject)
                    seen.append(self._look(triple))
                    masks |= {mask_sha256(view) for view in _views(triple.nerve_mask)}
        return Frames(keys, subjects, seen, frozenset(masks))

    def _look(self, triple: Triple) -> Looked:
        return looked(triple.image, nerves_of(triple) if self.blank_nerves else None)


@dataclass(frozen=True)
class SearchUnit:
    """Searching for the images of one shard."""

    searching: Searching
    images: ImageSet
    entry: ShardEntry

    def is_done(self) -> bool:
        """Whether it has been done."""
        return self.searching.is_done(self.images, self.entry)

    def run(self) -> None:
        """Do it.

        Raises:
            EvaluationError: If a frame cannot be compared.
            ShardError: If a shard is damaged.
        """
        self.searching.do(self.images, self.entry)


@dataclass(frozen=True)
class Duplicates:
    """Images of one synthetic set that show what another image of it shows, apart from the nerves.

    Attributes:
        sets: What is compared.
        images: The synthetic set.
    """

    sets: OpenedSets
    images: ImageSet

    def is_done(self) -> bool:
        """Whether they have been sought."""
        return read_json(self._path) is not None

    def run(self) -> None:
        """Seek them.

        Raises:
            EvaluationError: If an image cannot be compared.
            ShardError: If a shard is damaged.
        """
        self.table()

    def table(self) -> pd.DataFrame:
        """Of each image that was looked at: key, clinical_group, and its highest NCC with another one."""
        found = read_json(self._path)
        if found is None:
            found = {"images": list(self._rows())}
            commit_json(self._path, found)
        return pd.DataFrame(found["images"], columns=["key", "clinical_group", "ncc"])

    @property
    def _path(self) -> Path:
        shards = [entry.sha256 for entry in self.images.shards]
        identity = digest_of([SEARCH_VERSION, LIKENESS_VERSION, MAX_COMPARED, shards])
        folder, stem = self.sets.config.out / NEIGHBOURS, f"duplicates-{self.images.split}"
        return stored_path(folder, stem, identity, "json")

    def _rows(self) -> Iterator[dict[str, Any]]:
        num_images = sum(entry.num_samples for entry in self.images.shards)
        chosen = set(np.linspace(0, num_images - 1, min(num_images, MAX_COMPARED)).round().astype(int).tolist())
        triples = (triple for entry in self.images.shards for triple in self.images.triples(entry, self.sets.shape))
        told, seen = [], []
        for number, triple in enumerate(triples):
            if number in chosen:
                told.append({"key": triple.key, "clinical_group": triple.meta.clinical_group or ""})
                seen.append(looked(triple.image, nerves_of(triple)))
        gallery = np.stack([one.coarse for one in seen])
        for number, one in enumerate(seen):
            likeness = shifted_likeness(one, gallery)
            likeness[number] = -2
            other = int(likeness.argmax())
            ncc = aligned(one, seen[other], other, "none", 0.0).ncc if len(seen) > 1 else 0.0
            yield {**told[number], "ncc": round(ncc, 6)}


def searching_of(sets: OpenedSets) -> Searching | None:
    """How the images of an evaluation are searched for; None if no gate is wanted, or nothing was held out or trained.

    Nerves count, unless images may have the masks of training frames: those share their nerves, copied or not.
    """
    settings, training = sets.config.memorisation, sets.training
    if settings is None or training is None:
        return None
    return Searching(sets, training, settings.allow_training_masks)


def units(sets: OpenedSets) -> list[Unit]:
    """Searching the training set for the images of every shard, synthetic and held-out."""
    searching = searching_of(sets)
    if searching is None:
        return []
    searched = [*sets.synthetic, *searching.held_out, searching.training]
    found: list[Unit] = [SearchUnit(searching, images, entry) for images in searched for entry in images.shards]
    return found + [Duplicates(sets, images) for images in sets.synthetic]


def nerves_of(triple: Triple) -> NDArray[np.bool_]:
    """What of a frame its nerve mask fixes, with a margin."""
    return np.asarray(binary_dilation(triple.nerve_mask, iterations=BLANK_PX))


def distance_of(likeness: float) -> float:
    """Euclidean distance of two unit vectors with this cosine, six decimals."""
    return round(float(np.sqrt(max(0.0, 2 - 2 * likeness))), 6)


def _views(nerve_mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    yield nerve_mask
    for flip in FLIPS.values():
        yield flip(nerve_mask)
