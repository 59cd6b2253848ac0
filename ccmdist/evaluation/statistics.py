"""Statistics that several pillars use: means by subject, percentile and bootstrap intervals, Holm's correction."""

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import ArrayLike
from scipy.stats import norm, t

from ccmdist.ccm.skeleton import Floats


def subject_means(table: pd.DataFrame, column: str) -> pd.Series:
    """Mean over the frames of each subject, by subject; subjects without any value are left out."""
    means: pd.Series = table.groupby("subject", sort=True)[column].mean().dropna()
    return means


def interval(values: ArrayLike, level: float) -> tuple[float, float]:
    """Percentile interval that holds ``level`` of the values, such as 0.9; those that are not finite do not count.

    Returns:
        NaN and NaN if no value is finite.
    """
    given = np.asarray(values, np.float64)
    known = given[np.isfinite(given)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def holm(p_values: list[float]) -> list[float]:
    """The p values after Holm's step-down correction, in the order given."""
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(p_values, method="holm")[1]] if p_values else []


def bootstrap_interval(
    synthetic: Floats, real: Floats, level: float, num_bootstrap: int, rng: Generator
) -> tuple[float, float]:
    """Interval of the difference of means, resampling subjects, with all their frames, of either set.

    The percentiles are those of :func:`_level_of_few`, for Welch's degrees of freedom.

    Args:
        synthetic: Means of subjects, at least two.
        real: Likewise.
        level: Such as 0.9.
        num_bootstrap: Resamplings.
        rng: Draws them.
    """
    parts = [float(values.var(ddof=1)) / len(values) for values in (synthetic, real)]
    weights = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (synthetic, real), strict=True))
    freedom = sum(parts) ** 2 / weights if weights else np.inf
    draws = [_resampled_means(values, num_bootstrap, rng) for values in (synthetic, real)]
    return interval(draws[0] - draws[1], _level_of_few(level, freedom))


def paired_interval(differences: Floats, level: float, num_bootstrap: int, rng: Generator) -> tuple[float, float]:
    """Interval of the mean difference within subjects, at least two, resampling subjects; likewise."""
    means = _resampled_means(differences, num_bootstrap, rng)
    return interval(means, _level_of_few(level, len(differences) - 1))


def _resampled_means(values: Floats, num_bootstrap: int, rng: Generator) -> Floats:
    """Means of resamplings, (num_bootstrap,)."""
    num = len(values)
    means = values[rng.integers(0, num, (num_bootstrap, num))].mean(axis=1)
    # Left to themselves they have (n - 1) / n of the variance that means of such samples have.
    return np.asarray(values.mean() + (means - values.mean()) * np.sqrt(num / (num - 1)))


def _level_of_few(level: float, freedom: float) -> float:
    """Level at which percentiles of resampled means lie as far out as those of Student's t.

    Plain percentiles of six subjects per set cover 82 % where 90 % are meant, and of three 73 %: they would lie within
    a margin where the test at the same level does not find equivalence.

    Source:
        Hesterberg, The American Statistician 69:371 (2015), expanded percentile intervals.
    """
    return float(2 * norm.cdf(t.ppf((1 + level) / 2, freedom)) - 1)
