"""All that is measured on single images, shard by shard and once: a second run reads what the first one wrote."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import BIOMARKERS_VERSION, QUANTITIES, biomarkers
from ccmdist.ccm.overlap import centreline_dice, dice, offset_px
from ccmdist.ccm.segmenter import SEGMENTER_VERSION, segment
from ccmdist.ccm.skeleton import Bools
from ccmdist.commit import digest_of
from ccmdist.data.manifest import ShardEntry
from ccmdist.data.triple import Triple
from ccmdist.evaluation.biomarkers.chance import Nerves, with_other_masks
from ccmdist.evaluation.columns import CHAIN_CODE, FOUND, GIVEN
from ccmdist.evaluation.fidelity.appearance import appearance
from ccmdist.evaluation.fidelity.in_hole import measured_in_hole
from ccmdist.evaluation.fidelity.paired import blurred, similarity, without_similarity
from ccmdist.evaluation.sets import ImageSet, SourceFrames
from ccmdist.evaluation.stored import commit_numbers, read_numbers, stored_path

MEASURES_VERSION: Final = 3
"""Raised whenever a column changes its meaning; older files are then measured anew."""
TEXT_COLUMNS: Final = ("key", "subject", "clinical_group", "source_key", "shard", "origin", "partner_key")
ORIGIN: Final = (
    "base_digest",
    "base",
    "adapter_digest",
    "denoise_steps",
    "guidance_scale",
    "eta",
    "seed",
    "source_set_digest",
    "network_kind",
    "network_digest",
    "prompts",
    "structure",
    "objective",
)
"""What of a provenance tells how a whole set was made; column ``origin`` holds it as JSON."""


@dataclass(frozen=True)
class Measuring:
    """How images are measured.

    Attributes:
        folder: Where the files of measured shards lie.
        shape: Height and width at which all sets are compared.
        sources: Real frames for paired measures; None while the real set itself is measured, each frame of which is
            paired with its own blur.
    """

    folder: Path
    shape: tuple[int, int]
    sources: SourceFrames | None = None

    def table(self, images: ImageSet, entry: ShardEntry) -> pd.DataFrame:
        """One row per image of a shard, measured now or read from an earlier run.

        Raises:
            EvaluationError: If a synthetic sample cannot be evaluated.
            ShardError: If the shard is damaged.
        """
        found = _read(self._path(entry))
        if found is None:
            found = pd.DataFrame(list(self._rows(images, entry)))
            _commit(self._path(entry), found)
        return found

    def is_done(self, entry: ShardEntry) -> bool:
        """Whether a shard has been measured."""
        return _read(self._path(entry)) is not None

    def _path(self, entry: ShardEntry) -> Path:
        return stored_path(self.folder, entry.name.removesuffix(".tar"), self._identity(entry), "safetensors")

    def _identity(self, entry: ShardEntry) -> str:
        versions = [MEASURES_VERSION, SEGMENTER_VERSION, BIOMARKERS_VERSION]
        return digest_of([versions, entry.sha256, self.shape, self.sources.identity if self.sources else ""])

    def _rows(self, images: ImageSet, entry: ShardEntry) -> Iterator[dict[str, str | float]]:
        rows: list[dict[str, str | float]] = []
        nerves: list[Nerves] = []
        for triple in images.triples(entry, self.shape):
            about, found = _described(triple, entry), segment(triple.image)
            rows.append({**about, **measured(triple, found), **self._paired(triple)})
            nerves.append(Nerves.packed(triple.key, about["subject"], about["source_key"], found, triple.nerve_mask))
        for row, by_chance in zip(rows, with_other_masks(nerves), strict=True):
            yield row | by_chance

    def _paired(self, triple: Triple) -> dict[str, float]:
        if self.sources is None:
            return similarity(triple.image, blurred(triple.image))
        source = self.sources.of(triple)
        found = similarity(source.image, triple.image) if source else without_similarity()
        if triple.inpaint_mask is None:
            return found
        return found | measured_in_hole(triple, source, self.sources.of_another(triple))


@dataclass(frozen=True)
class MeasureUnit:
    """Measuring one shard of a set."""

    images: ImageSet
    measuring: Measuring
    entry: ShardEntry

    def is_done(self) -> bool:
        """Whether it has been measured."""
        return self.measuring.is_done(self.entry)

    def run(self) -> None:
        """Measure it.

        Raises:
            EvaluationError: If a synthetic sample cannot be evaluated.
            ShardError: If the shard is damaged.
        """
        self.measuring.table(self.images, self.entry)


def _described(triple: Triple, entry: ShardEntry) -> dict[str, str]:
    provenance = triple.meta.provenance or {}
    return {
        "key": triple.key,
        "subject": triple.meta.subject,
        "clinical_group": triple.meta.clinical_group or "",
        "source_key": str(provenance.get("source_key", triple.key)),
        "shard": entry.name,
        "origin": json.dumps({name: provenance[name] for name in ORIGIN if name in provenance}),
    }


def measured(triple: Triple, found: Bools) -> dict[str, float]:
    """Adherence, biomarkers and appearance of one image, in which the nerves ``found`` were found; by column."""
    um_per_px = triple.meta.um_per_px
    offset = offset_px(found, triple.nerve_mask)
    row = {
        "um_per_px": um_per_px,
        "dice": dice(found, triple.nerve_mask),
        "cldice": centreline_dice(found, triple.nerve_mask),
        "offset_px": float(np.hypot(*offset)),
    }
    for prefix, mask in ((FOUND, found), (GIVEN, triple.nerve_mask)):
        values = biomarkers(mask, um_per_px)
        row |= {f"{prefix}{name}": float(getattr(values, quantity.field)) for name, quantity in QUANTITIES.items()}
        row[f"{prefix}{CHAIN_CODE}"] = values.cnfl_chain_code
    return row | appearance(triple.image, found)


def _commit(path: Path, table: pd.DataFrame) -> None:
    texts = {name: table[name].tolist() for name in TEXT_COLUMNS}
    numbers = table.drop(columns=list(TEXT_COLUMNS))
    commit_numbers(path, numbers.to_numpy(np.float64), {"texts": texts, "columns": list(numbers.columns)})


def _read(path: Path) -> pd.DataFrame | None:
    if (stored := read_numbers(path)) is None:
        return None
    values, about = stored
    return pd.concat([pd.DataFrame(about["texts"]), pd.DataFrame(values, columns=about["columns"])], axis=1)
