"""Which checkpoint of a run draws best: the figures of each one's images, and the choice by one of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import pandas as pd
from scipy import stats

from ccmdist.config.select import Metric
from ccmdist.evaluation.biomarkers.summary import Adherence, adherence_of
from ccmdist.evaluation.columns import FOUND
from ccmdist.evaluation.statistics import subject_means

LENGTH: Final = "cnfl"
DEFINITIONS: Final[dict[Metric, str]] = {
    "cnfl_agreement": "ICC(2,1) of CNFL found in the images with that of their masks; the highest",
    "cnfl_bias": "mean CNFL found over that of the masks, less 1; the nearest to 0",
    "cnfl_equivalence": "margin at which CNFL becomes equivalent to that of the real frames; the lowest",
    "cldice": "mean clDice of the nerves found with the masks; the highest",
}


@dataclass(frozen=True)
class Figures:
    """What was measured on the images that one checkpoint drew, or on the real frames."""

    num_subjects: int
    adherence: Adherence
    cnfl_equivalence: float | None
    """As :func:`equivalence_margin`; None for the real frames."""

    def value(self, metric: Metric) -> float:
        """Of one metric; NaN if it could not be taken."""
        found = {
            "cnfl_agreement": self.adherence.agreement[LENGTH],
            "cnfl_bias": self.adherence.bias[LENGTH],
            "cnfl_equivalence": self.cnfl_equivalence,
            "cldice": self.adherence.cldice,
        }[metric]
        return math.nan if found is None else found


def figures_of(drawn: pd.DataFrame, real: pd.DataFrame | None, alpha: float) -> Figures:
    """The figures of a set of images.

    Args:
        drawn: A row per image, as :class:`~ccmdist.evaluation.measures.Measuring` gives them.
        real: The same of the frames whose masks were drawn; None if ``drawn`` are those.
        alpha: Of the equivalence test.
    """
    margin = None if real is None else equivalence_margin(real, drawn, f"{FOUND}{LENGTH}", alpha)
    return Figures(int(drawn["subject"].nunique()), adherence_of(drawn), margin)


def equivalence_margin(real: pd.DataFrame, drawn: pd.DataFrame, column: str, alpha: float) -> float:
    """Smallest margin at which two one-sided tests, paired by subject, would call a column equivalent in both.

    That is the end farther from zero of the 1 - 2 alpha interval of the mean difference between the two images of a
    subject, a subject's images averaged first. It grows with a bias, with scatter, and with few subjects.

    Returns:
        A fraction of the real mean; NaN for fewer than two subjects, or a real mean of zero.

    Source:
        Schuirmann 1987: TOST accepts at level alpha where the 1 - 2 alpha interval lies within the margins.
    """
    by_subject = [subject_means(table, column) for table in (real, drawn)]
    pairs = pd.concat(by_subject, axis=1, join="inner", keys=["real", "drawn"]).dropna()
    mean = float(pairs["real"].mean())
    if len(pairs) < 2 or not mean:
        return math.nan
    differences = pairs["drawn"] - pairs["real"]
    half_width = stats.t.ppf(1 - alpha, len(pairs) - 1) * float(differences.sem())
    return (abs(float(differences.mean())) + float(half_width)) / mean


def best_step(values: Mapping[int, float], metric: Metric) -> int | None:
    """The step whose value is best; the earliest of equal ones, and never one whose value is not finite.

    Args:
        values: Value of the metric by step.
        metric: What "best" means: the highest, the lowest, or the nearest to zero.

    Returns:
        None if no value is finite.
    """
    # The earlier of two equals has seen the training images less often.
    ranked = [(_loss(value, metric), step) for step, value in values.items() if math.isfinite(value)]
    return min(ranked)[1] if ranked else None


def _loss(value: float, metric: Metric) -> float:
    """What is to be small."""
    return {"cnfl_bias": abs(value), "cnfl_equivalence": value}.get(metric, -value)


def figure_values(figures: Figures) -> dict[str, Any]:
    """All figures as JSON types; what could not be taken is null."""
    adherence = figures.adherence
    return {
        "num_images": adherence.num_images,
        "num_subjects": figures.num_subjects,
        "cnfl_equivalence": _or_none(figures.cnfl_equivalence),
        "dice": _or_none(adherence.dice),
        "cldice": _or_none(adherence.cldice),
        "offset_px": _or_none(adherence.offset_px),
        "agreement": {name: _or_none(value) for name, value in adherence.agreement.items()},
        "bias": {name: _or_none(value) for name, value in adherence.bias.items()},
    }


def _or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
