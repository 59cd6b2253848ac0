"""Every distance between two sets of features, with its floor: families of distances that are taken in one go."""

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Final, Protocol

import numpy as np
from numpy.random import Generator

from ccmdist.ccm.skeleton import Bools, Floats
from ccmdist.config.evaluate import MinimumCounts
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.distances import FEWEST_SUBJECTS, Distance, Features, Split, label_of, splits
from ccmdist.evaluation.fidelity.frechet import IMAGES_PER_FEATURE, frechet_at_infinity, frechet_distance
from ccmdist.evaluation.fidelity.kernels import cmmd, kernel_distance
from ccmdist.evaluation.fidelity.neighbours import FEWEST_IMAGES, Neighbourhoods, neighbourhoods
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.statistics import interval

NUM_SUBSETS: Final = 100
"""Halves of the subjects of both sets for the interval of an unbiased distance."""
NUM_SPLITS_TO_EXTRAPOLATE: Final = 10
"""An extrapolation takes a dozen distances itself."""


class Extractor(Protocol):
    """What a distance says of what saw the images."""

    @property
    def name(self) -> str:
        """As in :class:`Distance`."""
        ...

    @property
    def sha256(self) -> str:
        """Likewise."""
        ...


@dataclass(frozen=True)
class Family:
    """Distances that share their work."""

    metrics: tuple[str, ...]
    of: Callable[[Floats, Floats, Generator], tuple[float, ...]]
    """Their values between two sets of features, (N, D) and (M, D)."""
    minimum: str
    """Field of MinimumCounts: images on either side, in halves too, below which they are left out."""
    fewest: int = 2
    """That it takes to compute them."""
    max_splits: int | None = None
    images_per_feature: int = 0
    """On either side, in halves too; with fewer they are left out."""
    is_unbiased: bool = False
    """Whether subsets of fewer images say anything of the spread of all."""


def _extrapolated(first: Floats, second: Floats, rng: Generator) -> tuple[float, ...]:
    found = frechet_at_infinity(first, second, rng)
    return found.distance, found.error


def _difference_of_means(first: Floats, second: Floats, _: Generator) -> tuple[float, ...]:
    """Root mean square of the difference of the means over images."""
    return (float(np.sqrt(((first.mean(axis=0) - second.mean(axis=0)) ** 2).mean())),)


FRECHET: Final = Family(("frechet",), lambda first, second, _: (frechet_distance(first, second),), "frechet_images")
EXTRAPOLATED: Final = Family(
    ("frechet_infinity",),
    _extrapolated,
    "frechet_images",
    max_splits=NUM_SPLITS_TO_EXTRAPOLATE,
    images_per_feature=IMAGES_PER_FEATURE,
)
KERNEL: Final = Family(
    ("kernel",), lambda first, second, _: (kernel_distance(first, second),), "kernel_images", is_unbiased=True
)
CMMD: Final = Family(("cmmd",), lambda first, second, _: (cmmd(first, second),), "kernel_images", is_unbiased=True)
NEIGHBOURS: Final = Family(
    tuple(field.name for field in fields(Neighbourhoods)),
    lambda first, second, _: astuple(neighbourhoods(first, second)),
    "neighbour_images",
    fewest=FEWEST_IMAGES,
)
OF_ANY_EXTRACTOR: Final = (FRECHET, EXTRAPOLATED, KERNEL, NEIGHBOURS)
SPECTRUM: Final = Family(("spectrum",), _difference_of_means, "noise_images")
GRAIN: Final = Family(("grain_acf",), _difference_of_means, "noise_images")


def distances_between(
    real: Features,
    synthetic: Features,
    extractor: Extractor,
    families: Sequence[Family],
    minimum: MinimumCounts,
    seed: int,
) -> tuple[list[Distance], list[LeftOut]]:
    """All distances of some families, and which were left out with the reason.

    Args:
        real: Of all real images.
        synthetic: Of all synthetic ones.
        extractor: What has seen them.
        families: What is taken.
        minimum: Counts below which a family is left out.
        seed: Of the halves; the same for every set, so that all stand beside one floor where their counts are equal.
    """
    found: list[Distance] = []
    left_out = []
    for family in families:
        # What is read beside its floor is the distance between halves, so these have to be large enough.
        of_config, of_features = getattr(minimum, family.minimum), family.images_per_feature * real.values.shape[1]
        fewest = max(family.fewest, of_config, of_features)
        try:
            if min(len(real), len(synthetic)) < fewest:
                have = f"{len(real)} real and {len(synthetic)} synthetic images"
                raise EvaluationError(f"{have}, at least {fewest} each are needed")
            found += _of_family(real, synthetic, extractor, family, fewest, seed)
        except EvaluationError as error:
            names = ", ".join(label_of(metric, extractor.name) for metric in family.metrics)
            left_out.append(LeftOut(f"{names} on {extractor.name}", error.message))
    return found, left_out


def _of_family(
    real: Features, synthetic: Features, extractor: Extractor, family: Family, fewest: int, seed: int
) -> list[Distance]:
    halves = splits(real, synthetic, fewest, np.random.default_rng(seed))[: family.max_splits]
    rng = np.random.default_rng([seed, len(halves)])
    values = family.of(real.values, synthetic.values, rng)
    floors = np.array([family.of(real.values[h.first], real.values[h.second], rng) for h in halves])
    of_halves = np.array([family.of(real.values[h.first], synthetic.values[h.synthetic], rng) for h in halves])
    intervals = _intervals(real, synthetic, family, values, rng) if family.is_unbiased else [None] * len(values)
    return [
        Distance(
            metric=metric,
            value=values[place],
            interval=intervals[place],
            of_halves=float(of_halves[:, place].mean()),
            of_halves_range=interval(of_halves[:, place], 0.9),
            floor=float(floors[:, place].mean()),
            floor_range=interval(floors[:, place], 0.9),
            num_real=len(real),
            num_synthetic=len(synthetic),
            num_in_half=_mean_count(halves),
            extractor=extractor.name,
            extractor_sha256=extractor.sha256,
            num_features=real.values.shape[1],
            fit_error=values[-1] if family is EXTRAPOLATED else None,
        )
        for place, metric in enumerate(family.metrics)
    ]


def _mean_count(halves: Sequence[Split]) -> int:
    return round(float(np.mean([len(half.first) for half in halves])))


def _intervals(
    real: Features, synthetic: Features, family: Family, values: tuple[float, ...], rng: Generator
) -> Sequence[tuple[float, float] | None]:
    """From 5th to 95th percentile around each value, over subsets of half of the subjects of either set.

    A half that is drawn without replacement lies as far from the whole as the whole lies from the population. So the
    subsets spread as the value does between samples of subjects; where both sets are alike, up to twice as far. None
    where a set has too few subjects.
    """
    if min(len(np.unique(one.subjects)) for one in (real, synthetic)) < FEWEST_SUBJECTS:
        return [None] * len(family.metrics)
    drawn = []
    for _ in range(NUM_SUBSETS):
        subsets = [one.values[_of_half_the_subjects(one, rng)] for one in (real, synthetic)]
        if min(map(len, subsets)) >= family.fewest:
            drawn.append(family.of(subsets[0], subsets[1], rng))
    around = np.array(drawn) - np.mean(drawn, axis=0) + np.array(values)
    return [interval(column, 0.9) for column in around.T]


def _of_half_the_subjects(one: Features, rng: Generator) -> Bools:
    subjects = np.unique(one.subjects)
    return np.isin(one.subjects, rng.permutation(subjects)[: len(subjects) // 2])
