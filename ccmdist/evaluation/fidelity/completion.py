"""Repaired frames of one synthetic set: what fills their holes, against the real frames and beside simple fills."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import pandas as pd
from numpy.random import Generator

from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS
from ccmdist.evaluation.fidelity.in_hole import (
    FILTER_DISTANCE,
    FILTERS,
    FILTERS_SHA256,
    IN_HOLE,
    IS_OWN,
    SHARE,
    column,
)
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.statistics import paired_interval, subject_means

LEVEL: Final = 0.95
"""Of the intervals."""
MIN_SUBJECTS: Final = 2


@dataclass(frozen=True)
class FillMeasure:
    """One measure of one way to fill holes; over means of subjects."""

    fill: str
    """A key of FILLS."""
    measure: str
    """A key of IN_HOLE."""
    mean: float
    interval: tuple[float, float]
    """95 %, bootstrap of subjects."""
    gain: float | None
    """By how much the model is better, over the same images; below 0 it is worse. None for the model itself."""
    gain_interval: tuple[float, float] | None
    num_images: int
    num_subjects: int


@dataclass(frozen=True)
class Completion:
    """What is known of the repaired frames of a set."""

    num_images: int
    """Repaired frames."""
    num_whole_images: int
    """Others of the same set, which were drawn whole."""
    share: float
    """Mean part of a frame that was filled."""
    measures: list[FillMeasure]
    filters: str = FILTERS
    filters_sha256: str = FILTERS_SHA256

    def measure(self, fill: str, name: str) -> FillMeasure | None:
        """One of them; None if it was left out."""
        return next((one for one in self.measures if (one.fill, one.measure) == (fill, name)), None)


def completion_of(
    table: pd.DataFrame, min_images: int, num_bootstrap: int, rng: Generator
) -> tuple[Completion | None, list[LeftOut]]:
    """The figures of a set's repaired frames, and what was left out with the reason; None for a set without any.

    Args:
        table: A row per image, as :class:`~ccmdist.evaluation.measures.Measuring` gives them.
        min_images: With a real frame to compare with, below which a fill is left out.
        num_bootstrap: Resamplings of subjects for the intervals.
        rng: Draws them.
    """
    if SHARE not in table:
        return None, []
    repaired = table.dropna(subset=[SHARE])
    found = [_of_fill(repaired, fill, min_images, num_bootstrap, rng) for fill in FILLS]
    completion = Completion(
        num_images=len(repaired),
        num_whole_images=len(table) - len(repaired),
        share=float(repaired[SHARE].mean()),
        measures=[measure for one in found if not isinstance(one, LeftOut) for measure in one],
    )
    return completion, [one for one in found if isinstance(one, LeftOut)]


def _of_fill(
    repaired: pd.DataFrame, fill: str, min_images: int, num_bootstrap: int, rng: Generator
) -> list[FillMeasure] | LeftOut:
    pairs = repaired.dropna(subset=[column(fill, measure) for measure in IN_HOLE])
    num_subjects = pairs["subject"].nunique()
    if len(pairs) < min_images or num_subjects < MIN_SUBJECTS:
        reason = (
            f"{len(pairs)} images of {num_subjects} subjects, at least {min_images} of {MIN_SUBJECTS} are needed"
            f"{_why_so_few(repaired, fill)}"
        )
        return LeftOut(f"inside the holes, {FILLS[fill]}", reason)
    return list(_measures(pairs, fill, num_bootstrap, rng))


def _why_so_few(repaired: pd.DataFrame, fill: str) -> str:
    num_own = int(repaired[IS_OWN].sum())
    if num_own:
        return (
            f": of {num_own} of {len(repaired)} repaired frames nobody knows what the hole hides, for it is their own"
        )
    if fill != DRAWN:
        return f": of {len(repaired)} repaired frames, the others have nothing to fill their holes with in this way"
    return f": the others of {len(repaired)} repaired frames are not of the real split"


def _measures(pairs: pd.DataFrame, fill: str, num_bootstrap: int, rng: Generator) -> Iterator[FillMeasure]:
    for measure in IN_HOLE:
        values = subject_means(pairs, column(fill, measure))
        gains = subject_means(pairs, column(DRAWN, measure)) - values
        if measure == FILTER_DISTANCE:
            gains = -gains
        has_gain = fill != DRAWN
        yield FillMeasure(
            fill=fill,
            measure=measure,
            mean=float(values.mean()),
            interval=paired_interval(values.to_numpy(), LEVEL, num_bootstrap, rng),
            gain=float(gains.mean()) if has_gain else None,
            gain_interval=paired_interval(gains.to_numpy(), LEVEL, num_bootstrap, rng) if has_gain else None,
            num_images=len(pairs),
            num_subjects=len(values),
        )
