"""Distances between real and synthetic images as sets, each with all that is needed to read it.

A distance depends on the number of images, on what sees them, and on how different two samples of the same tissue are.
So none exists here without those three: counts, extractor with hash, and the same distance between real images of two
halves of the subjects. Beside that stands the one between half of the real subjects and as many synthetic images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from ccmdist.ccm.skeleton import Floats
from ccmdist.errors import EvaluationError

NUM_SPLITS: Final = 40
"""Random halves of the subjects over which distances at matched counts are averaged."""
MAX_IN_HALF: Final = 1000
"""Images that are drawn of a half with more."""
FEWEST_SUBJECTS: Final = 4
INCEPTION: Final = "inception-v3-pool-2048"
"""The published weights of torch-fidelity: the one extractor whose Frechet distance is an FID."""


@dataclass(frozen=True)
class Metric:
    """How tables name a distance."""

    label: str
    higher_is_better: bool = False


METRICS: Final[dict[str, Metric]] = {
    "frechet": Metric("Frechet distance"),
    "frechet_infinity": Metric("Frechet distance, n → ∞"),
    "kernel": Metric("kernel distance"),
    "cmmd": Metric("CMMD"),
    "precision": Metric("precision", higher_is_better=True),
    "recall": Metric("recall", higher_is_better=True),
    "density": Metric("density", higher_is_better=True),
    "coverage": Metric("coverage", higher_is_better=True),
    "spectrum": Metric("power spectrum"),
    "grain_acf": Metric("grain autocorrelation"),
}


OF_INCEPTION: Final = {"frechet": "FID", "frechet_infinity": "FID, n → ∞", "kernel": "KID"}


def label_of(metric: str, extractor: str) -> str:
    """How tables name a distance on this extractor: FID and KID on the published Inception alone."""
    return OF_INCEPTION.get(metric, METRICS[metric].label) if extractor == INCEPTION else METRICS[metric].label


@dataclass(frozen=True)
class Features:
    """What an extractor sees in the images of a set."""

    values: Floats
    """(N, D)."""
    subjects: NDArray[np.str_]
    """(N,), of whom each image is, or whose mask it was drawn from."""

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class Distance:
    """One distance between a real and a synthetic set; it cannot exist, and so not be printed, without its context."""

    metric: str
    """A key of METRICS."""
    value: float
    """Between all real and all synthetic images."""
    interval: tuple[float, float] | None
    """Of kernel distances: 5th to 95th percentile, over halves of the subjects of both sets, around the value."""
    of_halves: float
    """Between real images of half of the subjects and as many synthetic ones of the other half; mean over splits."""
    of_halves_range: tuple[float, float]
    """5th to 95th percentile over splits."""
    floor: float
    """Between real images of one half of the subjects and as many of the other; mean over the same splits. Where higher
    is better it is the ceiling."""
    floor_range: tuple[float, float]
    num_real: int
    num_synthetic: int
    num_in_half: int
    """Images on either side in the distances of halves; on average over splits, rounded."""
    extractor: str
    extractor_sha256: str
    """Of its weights and of how it is given an image."""
    num_features: int
    fit_error: float | None = None
    """Of an extrapolated distance: the standard error of its line, not of another choice of images."""

    def __post_init__(self) -> None:
        counts = (self.num_real, self.num_synthetic, self.num_in_half, self.num_features)
        context = (self.of_halves, self.floor, *self.floor_range)
        if (
            self.metric not in METRICS
            or not self.extractor
            or len(self.extractor_sha256 or "") != 64
            or not all(isinstance(num, int) and num > 0 for num in counts)
            or not all(isinstance(number, float) and np.isfinite(number) for number in context)
        ):
            raise EvaluationError(
                "a distance without its extractor, that one's hash, the numbers of images and the real floor",
                "is not reported; give all of them",
            )
        if "fid" in self.extractor.lower():
            raise EvaluationError(f"extractor {self.extractor!r}: only Inception's pool features make an FID")

    def __str__(self) -> str:
        return (
            f"{label_of(self.metric, self.extractor)} {self.value:.3g} (n = {self.num_real} and {self.num_synthetic}); "
            f"halves {self.of_halves:.3g}, real floor {self.floor:.3g} (n = {self.num_in_half}); "
            f"{self.extractor} {self.extractor_sha256[:12]}"
        )


def whole(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of a table of distances with their labels.

    Raises:
        EvaluationError: If one lacks what it takes to read it; then there is no table.
    """
    labelled = []
    for row in rows:
        try:
            one = Distance(**row)
        except TypeError as error:
            raise EvaluationError(f"a distance that is to be printed is not whole: {error}") from error
        labelled.append({**row, "label": label_of(one.metric, one.extractor)})
    return labelled


@dataclass(frozen=True)
class Split:
    """Rows of images of two halves of the real subjects, and of synthetic images of the second half; equal counts.

    Where there are fewer synthetic images than real ones the real halves are cut as well: a floor at another number of
    images would be none.
    """

    first: NDArray[np.intp]
    second: NDArray[np.intp]
    synthetic: NDArray[np.intp]


def splits(real: Features, synthetic: Features, fewest_images: int, rng: Generator) -> list[Split]:
    """Random halves of the real subjects, never one subject in both.

    Args:
        real: All real images.
        synthetic: All synthetic ones. None of the first half's subjects is taken, for its mask would be known there.
        fewest_images: Halves with fewer, on any side, are drawn anew by chance of the next split.
        rng: Draws them.

    Raises:
        EvaluationError: If there are fewer than four real subjects, or no split has enough images.
    """
    subjects = np.unique(real.subjects)
    if len(subjects) < FEWEST_SUBJECTS:
        raise EvaluationError(
            f"{len(subjects)} real subjects, expected at least {FEWEST_SUBJECTS} to take subject-disjoint halves of",
            "evaluate a split with more subjects",
        )
    found = list(_splits(real, synthetic, subjects, fewest_images, rng))
    if not found:
        raise EvaluationError(
            f"no half of the subjects has {fewest_images} real and {fewest_images} synthetic images beside it",
            "evaluate more images",
        )
    return found


def _splits(
    real: Features, synthetic: Features, subjects: NDArray[np.str_], fewest_images: int, rng: Generator
) -> Iterator[Split]:
    for _ in range(NUM_SPLITS):
        chosen = rng.permutation(subjects)[: len(subjects) // 2]
        in_first = np.isin(real.subjects, chosen)
        parts = [in_first, ~in_first, ~np.isin(synthetic.subjects, chosen)]
        rows = [rng.permutation(np.flatnonzero(part)) for part in parts]
        num = min(MAX_IN_HALF, *map(len, rows))
        if num >= fewest_images:
            yield Split(*(np.sort(part[:num]) for part in rows))
