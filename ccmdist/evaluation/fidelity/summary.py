"""The first pillar of one synthetic set: paired measures, what the mask does not fix, and distances between sets."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import pandas as pd

from ccmdist.commit import digest_of
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.evaluation.fidelity.appearance import (
    APPEARANCE,
    GRAIN_COLUMNS,
    GRAIN_SIGMA_PX,
    SPECTRUM_COLUMNS,
    SPECTRUM_EDGES,
)
from ccmdist.evaluation.fidelity.distances import Distance, Features
from ccmdist.evaluation.fidelity.extraction import Extraction, together
from ccmdist.evaluation.fidelity.extractors import FeatureExtractor
from ccmdist.evaluation.fidelity.paired import PAIRED, num_scales
from ccmdist.evaluation.fidelity.set_distances import (
    CMMD,
    GRAIN,
    OF_ANY_EXTRACTOR,
    SPECTRUM,
    Family,
    distances_between,
)
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.statistics import interval, subject_means


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
class PairedMeasure:
    """One measure of images against the real frames whose masks were used; means over images."""

    measure: str
    """A key of PAIRED, or perceptual."""
    label: str
    mean: float
    range: tuple[float, float]
    """5th and 95th percentile."""
    of_blur: float
    """The same between real frames and themselves without their finest detail."""
    num_images: int
    num_real: int
    """Frames that were blurred."""
    extractor: str | None = None
    extractor_sha256: str | None = None


@dataclass(frozen=True)
class FidelityReport:
    """All of it that rests on enough images."""

    paired: list[PairedMeasure]
    appearance: list[AppearanceRow]
    distances: list[Distance]
    """Of power spectra and grain, then of each extractor."""

    def measure(self, name: str) -> PairedMeasure | None:
        """The paired measure of this name; None if it was left out."""
        return next((one for one in self.paired if one.measure == name), None)

    def distance(self, metric: str) -> Distance | None:
        """The first distance of this metric; None if it was left out."""
        return next((one for one in self.distances if one.metric == metric), None)


@dataclass(frozen=True)
class NoiseStatistic:
    """Columns of a measured image that are compared as a curve; an extractor in the sense of a distance."""

    name: str
    sha256: str
    columns: tuple[str, ...]
    family: Family


NOISE: Final = (
    NoiseStatistic("power-spectrum-v1", digest_of(["power-spectrum-v1", SPECTRUM_EDGES]), SPECTRUM_COLUMNS, SPECTRUM),
    NoiseStatistic(
        "grain-autocorrelation-v1",
        digest_of(["grain-autocorrelation-v1", GRAIN_SIGMA_PX, GRAIN_COLUMNS]),
        GRAIN_COLUMNS,
        GRAIN,
    ),
)


def fidelity_of(
    config: EvaluateConfig,
    name: str,
    extractions: list[Extraction],
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    shape: tuple[int, int],
) -> tuple[FidelityReport, list[LeftOut]]:
    """The report of one synthetic set, and what was left out with the reason.

    Args:
        config: Of the evaluation.
        name: Of the set.
        extractions: What the extractors have read, or read now.
        real: A row of measures per real image.
        synthetic: Likewise of the set.
        shape: Height and width at which they were measured.

    Raises:
        EvaluationError: If an extractor cannot be used.
    """
    distances, left_out = _noise_distances(config, real, synthetic)
    for extraction in extractions:
        features = _standardised(extraction.extractor, together(extraction.real), together(extraction.synthetic[name]))
        families = (*OF_ANY_EXTRACTOR, CMMD) if extraction.extractor.is_of_clip else OF_ANY_EXTRACTOR
        found = distances_between(*features, extraction.extractor, families, config.minimum, config.seed)
        distances += found[0]
        left_out += found[1]
    paired, without = _paired(config.minimum.paired_images, real, synthetic, shape)
    perceptual = [_perceptual(one, name, config.minimum.paired_images) for one in extractions if one.real_blur]
    return FidelityReport(
        paired=paired + [one for one in perceptual if isinstance(one, PairedMeasure)],
        appearance=list(_appearance(real, synthetic)),
        distances=distances,
    ), without + left_out + [one for one in perceptual if isinstance(one, LeftOut)]


def _standardised(extractor: FeatureExtractor, real: Features, synthetic: Features) -> tuple[Features, Features]:
    if not extractor.in_units_of_spread:
        return real, synthetic
    # A single image has no spread; its distances are left out anyway.
    centre, spread = real.values.mean(axis=0), np.ones(real.values.shape[1])
    if len(real.values) > 1:
        spread = np.maximum(real.values.std(axis=0, ddof=1), 1e-9)
    return tuple(Features((one.values - centre) / spread, one.subjects) for one in (real, synthetic))  # type: ignore[return-value]


def _noise_distances(
    config: EvaluateConfig, real: pd.DataFrame, synthetic: pd.DataFrame
) -> tuple[list[Distance], list[LeftOut]]:
    distances, left_out = [], []
    for statistic in NOISE:
        # A small image has no lowest frequency, a flat one no grain.
        columns = [name for name in statistic.columns if real[name].notna().any() and synthetic[name].notna().any()]
        sets = [table.dropna(subset=columns) for table in (real, synthetic)]
        first, second = (Features(one[columns].to_numpy(), one["subject"].to_numpy(str)) for one in sets)
        found = distances_between(first, second, statistic, [statistic.family], config.minimum, config.seed)
        distances += found[0]
        left_out += found[1]
    return distances, left_out


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


def _paired(
    min_images: int, real: pd.DataFrame, synthetic: pd.DataFrame, shape: tuple[int, int]
) -> tuple[list[PairedMeasure], list[LeftOut]]:
    pairs = synthetic.dropna(subset=["ssim"])
    if len(pairs) < min_images:
        return [], [LeftOut("SSIM, MS-SSIM and PSNR", _too_few_pairs(len(pairs), len(synthetic), min_images))]
    names, left_out = list(PAIRED), []
    if num_scales(shape) < 2:
        names.remove("ms_ssim")
        left_out.append(LeftOut("MS-SSIM", f"images of {min(shape)} px are too small for two of its scales"))
    labels = PAIRED | {"ms_ssim": f"{PAIRED['ms_ssim']}, {num_scales(shape)} scales"}
    return [_measure(name, labels[name], pairs[name], real[name]) for name in names], left_out


def _too_few_pairs(num: int, of: int, needed: int) -> str:
    return f"{num} of {of} images were drawn from a mask of the real split, at least {needed} are needed"


def _measure(name: str, label: str, values: pd.Series, of_blur: pd.Series) -> PairedMeasure:
    return PairedMeasure(
        name, label, float(values.mean()), interval(values, 0.9), float(of_blur.mean()), len(values), len(of_blur)
    )


def _perceptual(extraction: Extraction, name: str, min_images: int) -> PairedMeasure | LeftOut:
    extractor = extraction.extractor
    values = pd.Series(together(extraction.to_source[name]).values)
    pairs = values.dropna()
    if len(pairs) < min_images:
        what = f"perceptual distance on {extractor.name}"
        return LeftOut(what, _too_few_pairs(len(pairs), len(values), min_images))
    found = _measure("perceptual", "perceptual distance", pairs, pd.Series(together(extraction.real_blur).values))
    return replace(found, extractor=extractor.name, extractor_sha256=extractor.sha256)
