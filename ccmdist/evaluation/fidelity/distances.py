"""How near synthetic images are to real ones: paired with the frame of the same mask, and as distributions."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import NDArray

from ccmdist.ccm.skeleton import Floats
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.appearance import EXTRACTOR, EXTRACTOR_SHA256

NUM_SPLITS = 40
"""Random halves of the subjects over which distances at matched counts are averaged."""


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Structural similarity with Gaussian weights of 1.5 px, as Wang et al. 2004 define it, for 8-bit grey."""
    from skimage.metrics import structural_similarity

    value = structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(value)


def psnr_db(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB for 8-bit grey; 100 for equal images, so that a mean stays finite."""
    error = float(((first.astype(float) - second.astype(float)) ** 2).mean())
    return min(10 * np.log10(255**2 / error), 100.0) if error else 100.0


def frechet_distance(first: Floats, second: Floats) -> float:
    """Squared Frechet distance between normal distributions fitted to two sets of features (N, D) and (M, D).

    Source:
        Dowson and Landau 1982; |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)).
    """
    covariances = [np.atleast_2d(np.cov(values, rowvar=False)) for values in (first, second)]
    root = _square_root(covariances[0])
    # The eigenvalues of S1^(1/2) S2 S1^(1/2) are those of S1 S2, and this matrix is symmetric.
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    difference = first.mean(axis=0) - second.mean(axis=0)
    trace = np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.sqrt(np.clip(cross, 0, None)).sum()
    return float(difference @ difference + max(trace, 0.0))


def _square_root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T)


@dataclass(frozen=True)
class FrechetComparison:
    """A distance with all that is needed to read it; it cannot be printed without.

    A Frechet distance shrinks as the number of images grows. So the distance between real and synthetic is also taken
    between halves of the subjects, and stands beside the one between the two real halves: what two samples of the
    same tissue differ by at that number of images.
    """

    distance: float
    """Between all real and all synthetic images."""
    distance_of_halves: float
    """Between real images of half of the subjects and as many synthetic ones of the other half; mean over splits."""
    floor: float
    """Between real images of one half of the subjects and of the other; mean over the same splits."""
    floor_range: tuple[float, float]
    """5th and 95th percentile of the floor over the splits."""
    num_real: int
    num_synthetic: int
    num_in_half: int
    """Real images in a half; on average over splits, rounded."""
    extractor: str
    extractor_sha256: str

    def __post_init__(self) -> None:
        if not self.extractor or len(self.extractor_sha256) != 64 or not self.num_real or not np.isfinite(self.floor):
            raise EvaluationError(
                "a Frechet distance without its extractor, that one's hash, the number of images and the real floor",
                "is not reported; give all of them",
            )
        if "fid" in self.extractor.lower():
            raise EvaluationError(f"extractor {self.extractor!r}: only Inception's pool features make an FID")

    def __str__(self) -> str:
        return (
            f"{self.distance:.2f} (n = {self.num_real} and {self.num_synthetic}); "
            f"halves {self.distance_of_halves:.2f}, real floor {self.floor:.2f} (n = {self.num_in_half}); "
            f"{self.extractor} {self.extractor_sha256[:12]}"
        )


def compare_features(
    real: pd.DataFrame, synthetic: pd.DataFrame, columns: list[str], rng: Generator
) -> FrechetComparison:
    """The distance between two sets of measured images, with its floor.

    Args:
        real: A row per real image, with a column ``subject``.
        synthetic: Likewise of synthetic images; the subject is that of the mask.
        columns: The features. Each is divided by its spread over the real images, so that none drowns the others.
        rng: Draws the halves.

    Raises:
        EvaluationError: If there are fewer than four real subjects to take halves of.
    """
    centre, spread = real[columns].mean(), real[columns].std().clip(lower=1e-9)
    real, synthetic = (
        pd.concat([table[["subject"]], (table[columns] - centre) / spread], axis=1) for table in (real, synthetic)
    )
    floors, distances, counts = [], [], []
    for first, second in list(_halves(real, rng)):
        other = synthetic[~synthetic["subject"].isin(first["subject"])]
        floors.append(frechet_distance(first[columns].to_numpy(), second[columns].to_numpy()))
        counts.append(len(second))
        if len(other) >= 2:
            chosen = rng.permutation(len(other))[: len(second)]
            distances.append(frechet_distance(first[columns].to_numpy(), other[columns].to_numpy()[chosen]))
    return FrechetComparison(
        distance=frechet_distance(real[columns].to_numpy(), synthetic[columns].to_numpy()),
        distance_of_halves=float(np.mean(distances)) if distances else float("nan"),
        floor=float(np.mean(floors)),
        floor_range=(float(np.percentile(floors, 5)), float(np.percentile(floors, 95))),
        num_real=len(real),
        num_synthetic=len(synthetic),
        num_in_half=round(float(np.mean(counts))),
        extractor=EXTRACTOR,
        extractor_sha256=EXTRACTOR_SHA256,
    )


def _halves(real: pd.DataFrame, rng: Generator) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """Random halves of the subjects, never one subject in both."""
    subjects = np.sort(real["subject"].unique())
    if len(subjects) < 4:
        raise EvaluationError(
            f"{len(subjects)} real subjects, expected at least 4 to take subject-disjoint halves of",
            "evaluate a split with more subjects",
        )
    for _ in range(NUM_SPLITS):
        in_first = real["subject"].isin(rng.permutation(subjects)[: len(subjects) // 2])
        if min(in_first.sum(), (~in_first).sum()) >= 2:
            yield real[in_first], real[~in_first]
