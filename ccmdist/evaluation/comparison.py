"""From the measured images of all sets to the figures of the report; what rests on too few images is left out."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import BIOMARKERS_VERSION, QUANTITIES
from ccmdist.ccm.groups import UNLABELLED
from ccmdist.ccm.segmenter import SEGMENTER_VERSION
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.biomarkers.adherence import absolute_agreement
from ccmdist.evaluation.biomarkers.equivalence import Equivalence, LeftOut, equivalence_of_set, subject_means
from ccmdist.evaluation.downstream import grid
from ccmdist.evaluation.downstream.summary import DownstreamSummary, summary_of
from ccmdist.evaluation.fidelity import extraction
from ccmdist.evaluation.fidelity.appearance import APPEARANCE, EXTRACTOR, EXTRACTOR_SHA256, NUM_FEATURES
from ccmdist.evaluation.fidelity.distances import FrechetComparison, compare_features
from ccmdist.evaluation.measures import FEATURES, FOUND, GIVEN, MeasureUnit, Measuring
from ccmdist.evaluation.memorisation import search
from ccmdist.evaluation.memorisation.gate import GateVerdict, verdict_of
from ccmdist.evaluation.sets import ImageSet, OpenedSets, SourceFrames, open_sets
from ccmdist.evaluation.work import Unit

MEASURES_FOLDER: Final = "features"


@dataclass(frozen=True)
class Adherence:
    """How the nerves found in images of a set agree with the masks that came with them."""

    num_images: int
    dice: float
    """Mean over images, as everything here that is not said to be otherwise."""
    cldice: float
    dice_range: tuple[float, float]
    """5th and 95th percentile over images."""
    cldice_range: tuple[float, float]
    offset_px: float
    """Median over images."""
    agreement: dict[str, float]
    """ICC(2,1) of each biomarker: found nerves against the mask."""
    bias: dict[str, float]
    """Of each biomarker: mean of found minus mean of the mask's, as a fraction of the latter."""


@dataclass(frozen=True)
class AppearanceRow:
    """One statistic of what a mask does not fix; over means of subjects."""

    statistic: str
    real_mean: float
    real_sd: float
    synthetic_mean: float
    synthetic_sd: float
    standardised_difference: float
    """Difference of the means over the real SD between subjects."""


@dataclass(frozen=True)
class Paired:
    """Against the real frame whose mask was used; means over images, with the 5th and 95th percentile."""

    num_images: int
    ssim: float
    ssim_range: tuple[float, float]
    psnr_db: float
    psnr_db_range: tuple[float, float]


@dataclass(frozen=True)
class SetReport:
    """All figures of one synthetic set."""

    images: ImageSet
    counts: dict[str, Any]
    origins: list[dict[str, Any]]
    """Models and settings that drew it, as its images say; one, unless sets were mixed."""
    shares_subjects: bool
    """Whether its masks are of subjects that are also in the real split."""
    adherence: Adherence
    equivalence: list[Equivalence]
    appearance: list[AppearanceRow]
    paired: Paired | None
    frechet: FrechetComparison | None
    gate: GateVerdict | None
    """None if the settings want no gate."""
    left_out: list[LeftOut]
    table: pd.DataFrame = field(repr=False)
    """A row per image."""

    @property
    def name(self) -> str:
        """As the settings call it."""
        return self.images.name


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
            "extractor": EXTRACTOR,
            "extractor_sha256": EXTRACTOR_SHA256,
            "num_features": NUM_FEATURES,
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
    folder = sets.config.out / MEASURES_FOLDER
    sources = SourceFrames(sets.real, sets.shape)
    paired_with = f"{sets.real.manifest.digest}/{sets.real.split}"
    measured = [Side(one, Measuring(folder, sets.shape, sources, paired_with)) for one in sets.synthetic]
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
        EvaluationError: If the sets cannot be compared: wrong kind, empty split, no provenance, different sizes.
        ShardError: If a shard is damaged.
    """
    sets = open_sets(config)
    real, *synthetic = sides(sets)
    table = real.table
    reports = [_set_report(sets, one.images, table, one.table) for one in synthetic]
    return Comparison(
        config=config,
        real=sets.real,
        shape=sets.shape,
        counts=counts_of(table),
        segmenter_error=adherence_of(table),
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


def _set_report(sets: OpenedSets, one: ImageSet, real: pd.DataFrame, synthetic: pd.DataFrame) -> SetReport:
    config = sets.config
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
    paired = _paired(synthetic, config.minimum.paired_images)
    if isinstance(paired, str):
        left_out.append(LeftOut("SSIM and PSNR", paired))
    # The same halves for every set, so that all stand beside one floor.
    halves = np.random.default_rng(config.seed)
    frechet = _frechet(real, synthetic, config.minimum.frechet_images, halves)
    if isinstance(frechet, str):
        left_out.append(LeftOut(f"Frechet distance on {EXTRACTOR}", frechet))
    return SetReport(
        images=one,
        counts=counts_of(synthetic),
        origins=[json.loads(origin) for origin in sorted(synthetic["origin"].unique())],
        shares_subjects=bool(synthetic["subject"].isin(real["subject"]).any()),
        adherence=adherence_of(synthetic),
        equivalence=equivalence,
        appearance=list(_appearance(real, synthetic)),
        paired=None if isinstance(paired, str) else paired,
        frechet=None if isinstance(frechet, str) else frechet,
        gate=verdict_of(sets, one),
        left_out=left_out,
        table=synthetic,
    )


def adherence_of(table: pd.DataFrame) -> Adherence:
    """Agreement of found nerves and given masks over the images of a set."""
    means = {prefix: table[[f"{prefix}{name}" for name in QUANTITIES]].mean() for prefix in (FOUND, GIVEN)}
    return Adherence(
        num_images=len(table),
        dice=float(table["dice"].mean()),
        cldice=float(table["cldice"].mean()),
        dice_range=_range(table["dice"]),
        cldice_range=_range(table["cldice"]),
        offset_px=float(table["offset_px"].median()),
        agreement={
            name: absolute_agreement(table[FOUND + name].to_numpy(), table[GIVEN + name].to_numpy())
            for name in QUANTITIES
        },
        bias={name: _fraction(means[FOUND][FOUND + name], means[GIVEN][GIVEN + name]) for name in QUANTITIES},
    )


def _fraction(found: float, given: float) -> float:
    return float(found / given - 1) if given else float("nan")


def _range(values: pd.Series) -> tuple[float, float]:
    low, high = values.quantile([0.05, 0.95])
    return float(low), float(high)


def _appearance(real: pd.DataFrame, synthetic: pd.DataFrame) -> Iterator[AppearanceRow]:
    for statistic in APPEARANCE:
        first, second = subject_means(real, statistic), subject_means(synthetic, statistic)
        difference = float(second.mean() - first.mean())
        spread = float(first.std())
        yield AppearanceRow(
            statistic,
            float(first.mean()),
            spread,
            float(second.mean()),
            float(second.std()),
            difference / spread if spread > 0 else float("nan"),
        )


def _paired(table: pd.DataFrame, min_images: int) -> Paired | str:
    pairs = table.dropna(subset=["ssim"])
    if len(pairs) < min_images:
        return (
            f"{len(pairs)} of {len(table)} images were drawn from a mask of the real split, "
            f"at least {min_images} are needed"
        )
    return Paired(
        len(pairs),
        float(pairs["ssim"].mean()),
        _range(pairs["ssim"]),
        float(pairs["psnr_db"].mean()),
        _range(pairs["psnr_db"]),
    )


def _frechet(
    real: pd.DataFrame, synthetic: pd.DataFrame, min_images: int, rng: np.random.Generator
) -> FrechetComparison | str:
    if min(len(real), len(synthetic)) < min_images:
        return f"{len(real)} real and {len(synthetic)} synthetic images, at least {min_images} each are needed"
    try:
        return compare_features(real, synthetic, FEATURES, rng)
    except EvaluationError as error:
        return error.message
