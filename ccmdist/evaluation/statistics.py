"""Statistics that several pillars use: means by subject, percentile intervals, Holm's correction."""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike


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
