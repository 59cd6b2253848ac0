"""From the measured images of all sets to the figures of the report; what rests on too few images is left out."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import BIOMARKERS_VERSION
from ccmdist.ccm.groups import UNLABELLED
from ccmdist.ccm.segmenter import SEGMENTER_VERSION
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.data.trained_on import subjects_trained_on
from ccmdist.evaluation.biomarkers.equivalence import Equivalence, equivalence_of_set
from ccmdist.evaluation.biomarkers.summary import (
    Adherence,
    Control,
    adherence_of,
    controls,
    refuse_other_pixels,
    refuse_without_masks,
)
from ccmdist.evaluation.columns import FOUND
from ccmdist.evaluation.downstream import grid
from ccmdist.evaluation.downstream.summary import DownstreamSummary, summary_of
from ccmdist.evaluation.fidelity import extraction
from ccmdist.evaluation.fidelity.completion import Completion, completion_of
from ccmdist.evaluation.fidelity.summary import FidelityReport, fidelity_of
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.measures import MeasureUnit, Measuring
from ccmdist.evaluation.memorisation import search
from ccmdist.evaluation.memorisation.gate import GateVerdict, verdict_of
from ccmdist.evaluation.sets import ImageSet, OpenedSets, SourceFrames, open_sets
from ccmdist.evaluation.stored import MEASURES
from ccmdist.evaluation.work import Unit


@dataclass(frozen=True)
class SetReport:
    """All figures of one synthetic set."""

    images: ImageSet
    counts: dict[str, Any]
    origins: list[dict[str, Any]]
    """Models and settings that drew it, as its images say; one, unless sets were mixed."""
    shares_subjects: bool
    """Whether its masks are of subjects that are also in the real split."""
    num_reference_seen: int | None
    """Subjects of the real split on whom its generator was trained; None if it does not say on whom it was."""
    control: Control | None
    """What it was drawn to be compared with, if it is a control."""
    adherence: Adherence
    equivalence: list[Equivalence]
    fidelity: FidelityReport
    completion: Completion | None
    """Of its repaired frames; None if it has none."""
    gate: GateVerdict | None
    """None if the settings want no gate."""
    left_out: list[LeftOut]
    table: pd.DataFrame = field(repr=False)
    """A row per image."""

    @property
    def name(self) -> str:
        """As the settings call it."""
        return self.images.name

    @property
    def label(self) -> str:
        """The name, and what it is if it is a control."""
        return f"{self.name} (wrong prompt)" if self.control else self.name


@dataclass(frozen=True)
class Comparison:
    """All figures of an evaluation."""

    config: EvaluateConfig
    real: ImageSet
    shape: tuple[int, int]
    counts: dict[str, Any]
    segmenter_error: Adherence
    """Of the frozen segmenter on the real images against the masks given with them."""
    sets: list[SetReport]
    downstream: DownstreamSummary | None
    """None if the settings want no downstream tasks."""
    table: pd.DataFrame = field(repr=False)
    """A row per real image."""

    @property
    def versions(self) -> dict[str, Any]:
        """What the figures depend on besides the images."""
        return {
            "segmenter": SEGMENTER_VERSION,
            "biomarkers": BIOMARKERS_VERSION,
        }


@dataclass(frozen=True)
class Side:
    """A set and how it is measured."""

    images: ImageSet
    measuring: Measuring

    @property
    def units(self) -> list[Unit]:
        """Measuring its shards, one by one."""
        return [MeasureUnit(self.images, self.measuring, entry) for entry in self.images.shards]

    @property
    def table(self) -> pd.DataFrame:
        """One row per image of the set, measured now or read from an earlier run."""
        tables = [self.measuring.table(self.images, entry) for entry in self.images.shards]
        return pd.concat(tables, ignore_index=True)


def sides(sets: OpenedSets) -> list[Side]:
    """The real set, then the synthetic ones; measures nothing."""
    folder = sets.config.out / MEASURES
    sources = SourceFrames(sets.real, sets.shape)
    measured = [Side(one, Measuring(folder, sets.shape, sources)) for one in sets.synthetic]
    return [Side(sets.real, Measuring(folder, sets.shape)), *measured]


def units(config: EvaluateConfig) -> list[Unit]:
    """All work of an evaluation, in an order that every worker sees alike.

    Raises:
        EvaluationError: If the sets cannot be compared.
    """
    sets = open_sets(config)
    measuring = [unit for side in sides(sets) for unit in side.units]
    return [*measuring, *extraction.units(sets), *search.units(sets), *grid.units(sets)]


def compare(config: EvaluateConfig) -> Comparison:
    """Compare the sets; does what units of work are left.

    Raises:
        EvaluationError: If the sets cannot be compared: wrong kind, empty split, no provenance, different sizes,
            pixels of another size, no masks.
        ShardError: If a shard is damaged.
    """
    sets = open_sets(config)
    real, *synthetic = sides(sets)
    table = real.table
    refuse_without_masks(table, "real")
    extractions = extraction.extractions(sets)
    reports = [_set_report(sets, one.images, extractions, table, one.table) for one in synthetic]
    tables = {one.name: one.table for one in reports}
    control = controls({one.name: one.origins for one in reports}, tables, config.minimum.agreement_images)
    reports = [replace(one, control=control.get(one.name)) for one in reports]
    return Comparison(
        config=config,
        real=sets.real,
        shape=sets.shape,
        counts=counts_of(table),
        segmenter_error=adherence_of(table, config.minimum.agreement_images),
        sets=reports,
        downstream=summary_of(sets),
        table=table,
    )


def counts_of(table: pd.DataFrame) -> dict[str, Any]:
    """Images and subjects, in all and by clinical group."""
    labels = table["clinical_group"].replace("", UNLABELLED)
    return {
        "num_images": len(table),
        "num_subjects": int(table["subject"].nunique()),
        "images_by_group": {str(group): int(num) for group, num in labels.value_counts().sort_index().items()},
        "subjects_by_group": {
            str(group): int(num) for group, num in table["subject"].groupby(labels).nunique().sort_index().items()
        },
    }


def _set_report(
    sets: OpenedSets,
    one: ImageSet,
    extractions: list[extraction.Extraction],
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
) -> SetReport:
    config = sets.config
    refuse_without_masks(synthetic, f"synthetic.{one.name}")
    refuse_other_pixels(real, synthetic, one.name)
    adherence = adherence_of(synthetic, config.minimum.agreement_images)
    rng = np.random.default_rng([config.seed, *one.name.encode()])
    equivalence, left_out = equivalence_of_set(
        real,
        synthetic,
        FOUND,
        config.margins,
        config.alpha,
        config.minimum.equivalence_subjects,
        config.num_bootstrap,
        rng,
    )
    seen = subjects_trained_on(one.manifest, [sets.real.manifest])
    fidelity, without = fidelity_of(config, one.name, extractions, real, synthetic, sets.shape)
    completion, no_fills = completion_of(synthetic, config.minimum.paired_images, config.num_bootstrap, rng)
    return SetReport(
        images=one,
        counts=counts_of(synthetic),
        origins=[json.loads(origin) for origin in sorted(synthetic["origin"].unique())],
        shares_subjects=bool(synthetic["subject"].isin(real["subject"]).any()),
        num_reference_seen=None if seen is None else len(seen & set(real["subject"])),
        control=None,
        adherence=adherence,
        equivalence=equivalence,
        fidelity=fidelity,
        completion=completion,
        gate=verdict_of(sets, one, completion.num_images if completion else 0),
        left_out=adherence.left_out + left_out + without + no_fills,
        table=synthetic,
    )
