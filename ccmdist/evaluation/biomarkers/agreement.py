"""Do two ways to take a value of the same images agree: intraclass correlation, and limits of agreement."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import t

from ccmdist.ccm.skeleton import Floats

Z_OF_LIMITS: Final = 1.96
"""Limits of agreement hold 95 % of differences."""
LEVEL: Final = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class BlandAltman:
    """Differences of paired values, first minus second, in their unit."""

    num_pairs: int
    num_subjects: int
    bias: float
    """Mean difference."""
    bias_interval: tuple[float, float]
    """95 %, as those of the limits. They count subjects and not images: cautious where images of a subject differ."""
    lower: float
    """Limits of agreement: bias -+ 1.96 standard deviations of the differences."""
    lower_interval: tuple[float, float]
    upper: float
    upper_interval: tuple[float, float]


def absolute_agreement(first: Floats, second: Floats) -> float:
    """ICC(2,1): two-way random effects, absolute agreement, single measurement, of two values of each image.

    Returns:
        1 for equal values; NaN for fewer than three pairs without NaN, or values without spread.

    Source:
        Shrout and Fleiss 1979; McGraw and Wong 1996, case 2 ICC(A,1).
    """
    values = np.stack([first, second], axis=1)
    values = values[np.isfinite(values).all(axis=1)]
    num, judges = values.shape
    if num < 3:
        return float("nan")
    rows, columns, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    between_rows = judges * ((rows - mean) ** 2).sum() / (num - 1)
    between_columns = num * ((columns - mean) ** 2).sum() / (judges - 1)
    residual = ((values - rows[:, None] - columns + mean) ** 2).sum() / ((num - 1) * (judges - 1))
    total = between_rows + (judges - 1) * residual + judges * (between_columns - residual) / num
    return float((between_rows - residual) / total) if total > 0 else float("nan")


def limits_of_agreement(first: Floats, second: Floats, num_subjects: int) -> BlandAltman:
    """Bias and limits of agreement of pairs without NaN, at least three.

    With s the standard deviation of the differences and n subjects, the bias has the standard error s / sqrt(n) and a
    limit s sqrt(1 / n + 1.96^2 / (2 (n - 1))); intervals take Student's t at n - 1 degrees of freedom.

    Args:
        first: Values (N,).
        second: Values (N,) of the same images.
        num_subjects: That the images are of, at least two.

    Source:
        Bland and Altman 1986, Lancet 1:307; 1999, Stat. Methods Med. Res. 8:135 for the error of a limit. With one
        image per subject these are their intervals.
    """
    differences = first - second
    bias, spread = float(differences.mean()), float(differences.std(ddof=1))
    quantile = float(t.ppf((1 + LEVEL) / 2, num_subjects - 1))
    of_bias = quantile * spread / np.sqrt(num_subjects)
    of_limit = quantile * spread * np.sqrt(1 / num_subjects + Z_OF_LIMITS**2 / (2 * (num_subjects - 1)))
    lower, upper = bias - Z_OF_LIMITS * spread, bias + Z_OF_LIMITS * spread
    return BlandAltman(
        num_pairs=len(differences),
        num_subjects=num_subjects,
        bias=bias,
        bias_interval=(bias - float(of_bias), bias + float(of_bias)),
        lower=lower,
        lower_interval=(lower - float(of_limit), lower + float(of_limit)),
        upper=upper,
        upper_interval=(upper - float(of_limit), upper + float(of_limit)),
    )
