"""From the measured images of all sets to the figures of the report; what rests on too few images is left out."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import BIOMARKERS_VERSION, QUANTITIES
from ccmdist.ccm.groups import UNLABELLED
from ccmdist.ccm.segmenter import SEGMENTER_VERSION
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.console import log, tracked
from ccmdist.data.manifest import ShardEntry
from ccmdist.errors import EvaluationError, Preempted
from ccmdist.evaluation.adherence import absolute_agreement
from ccmdist.evaluation.appearance import APPEARANCE, EXTRACTOR, EXTRACTOR_SHA256, NUM_FEATURES
from ccmdist.evaluation.biomarker_equivalence import Equivalence, LeftOut, equivalence_of_set, subject_means
from ccmdist.evaluation.features import FEATURES, FOUND, GIVEN, Measuring
from ccmdist.evaluation.fidelity import FrechetComparison, compare_features
from ccmdist.evaluation.sets import ImageSet, SourceFrames, common_shape, real_set, synthetic_sets

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

    def measure(self, entry: ShardEntry) -> pd.DataFrame:
        """One row per image of a shard, measured now or read from an earlier run."""
        return self.measuring.table(self.images, entry)

    @property
    def table(self) -> pd.DataFrame:
        """One row per image of the set."""
        return pd.concat([self.measure(entry) for entry in self.images.shards], ignore_index=True)


def sides(config: EvaluateConfig) -> list[Side]:
    """The real set, then the synthetic ones; measures nothing.

    Raises:
        EvaluationError: If the sets cannot be compared: wrong kind, empty split, different sizes.
    """
    real, synthetic = real_set(config), synthetic_sets(config)
    shape = common_shape(synthetic)
    folder, paired_with = config.out / MEASURES_FOLDER, f"{real.manifest.digest}/{real.split}"
    sources = SourceFrames(real, shape)
    measured = [Side(one, Measuring(folder, shape, sources, paired_with)) for one in synthetic]
    return [Side(real, Measuring(folder, shape)), *measured]


def measure(
    config: EvaluateConfig,
    worker_index: int = 0,
    num_workers: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Measure every shard of this worker that no run has measured yet.

    Args:
        config: Which sets.
        worker_index: This worker takes the shards ``worker_index::num_workers`` of all sets together.
        num_workers: Workers that share the shards without talking to each other.
        should_stop: Asked between shards.

    Raises:
        Preempted: If ``should_stop`` said so while there was work left; what was measured is committed.
        EvaluationError: If the sets cannot be compared, or a synthetic sample says too little about its origin.
        ShardError: If a shard is damaged.
    """
    mine = _work(config)[worker_index::num_workers]
    left = _unmeasured(mine)
    log.info("%s: %d of this worker's %d shards are to be measured", config.out, len(left), len(mine))
    for done, (side, entry) in enumerate(tracked(left, "shards", len(left))):
        if should_stop():
            raise Preempted(
                f"evaluate: stopped with {done} of {len(left)} shards measured and committed",
                "run the same command again",
            )
        side.measure(entry)


def num_unmeasured(config: EvaluateConfig) -> int:
    """Shards of all sets that no run has measured yet.

    Raises:
        EvaluationError: If the sets cannot be compared.
    """
    return len(_unmeasured(_work(config)))


def _work(config: EvaluateConfig) -> list[tuple[Side, ShardEntry]]:
    return [(side, entry) for side in sides(config) for entry in side.images.shards]


def _unmeasured(work: list[tuple[Side, ShardEntry]]) -> list[tuple[Side, ShardEntry]]:
    return [(side, entry) for side, entry in work if not side.measuring.is_done(entry)]


def compare(config: EvaluateConfig) -> Comparison:
    """Compare the sets; measures what :func:`measure` has left.

    Raises:
        EvaluationError: If the sets cannot be compared: wrong kind, empty split, no provenance, different sizes.
        ShardError: If a shard is damaged.
    """
    real, *synthetic = sides(config)
    table = real.table
    reports = [_set_report(config, one.images, table, one.table) for one in synthetic]
    shape = real.measuring.shape
    return Comparison(config, real.images, shape, counts_of(table), adherence_of(table), reports, table)


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


def _set_report(config: EvaluateConfig, one: ImageSet, real: pd.DataFrame, synthetic: pd.DataFrame) -> SetReport:
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
