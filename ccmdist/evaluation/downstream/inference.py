"""Is an arm better than another one on the same subjects: resampled intervals, McNemar's test, DeLong's test.

Frames of a subject are not independent, so subjects are resampled with all their frames, and the two classical tests
take a subject once, with the mean of the probabilities of its frames and of all seeds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.stats import norm, rankdata

from ccmdist.ccm.skeleton import Bools, Floats
from ccmdist.evaluation.downstream.scores import Labels


@dataclass(frozen=True)
class DeLong:
    """Two areas under the ROC curve on the same subjects."""

    first: float
    second: float
    p: float
    """Of the hypothesis that they are equal."""


def resampled(groups: Labels, num: int, rng: Generator) -> Floats:
    """How often each subject was drawn in each resampling, (1 + ``num``, subjects); the first has each one once.

    Drawn with replacement within each clinical group, so that every resampling has all groups.

    Args:
        groups: Of the subjects, any labels.
        num: Resamplings.
        rng: Draws them.
    """
    weights = np.zeros((num + 1, len(groups)))
    weights[0] = 1
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        weights[1:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), num)
    return weights


def resampled_p(differences: Floats) -> float:
    """Two-sided p of a difference of zero: twice the smaller share of resamplings on either side of it, at most 1.

    Never less than 2 / (resamplings + 1), which is all that so many resamplings can tell.
    """
    known = differences[np.isfinite(differences)]
    tail = min((known <= 0).sum(), (known >= 0).sum())
    return float(min(1.0, 2 * (tail + 1) / (len(known) + 1)))


def mcnemar(first: Bools, second: Bools) -> float:
    """Exact p of McNemar's test: were as many recognised by the first alone as by the second alone.

    Args:
        first: Whether each subject was recognised by one network.
        second: By the other.
    """
    from statsmodels.stats.contingency_tables import mcnemar as test

    table = [[(first & second).sum(), (first & ~second).sum()], [(~first & second).sum(), (~first & ~second).sum()]]
    return float(min(1.0, test(table, exact=True).pvalue))


def delong(is_positive: Bools, first: Floats, second: Floats, folds: Labels | None = None) -> DeLong:
    """Two correlated areas under the ROC curve, compared.

    Args:
        is_positive: (N,), whether each subject is of the class.
        first: (N,), its probability by one network.
        second: By the other.
        folds: (N,), which subjects were tested by one network; areas then count pairs of one fold, as
            :func:`~ccmdist.evaluation.downstream.scores.macro_auc` does. None: all of them.

    Returns:
        The areas and the p; 1 where the two rank all subjects alike. NaN where a variance cannot be known: a fold has a
        single subject of either side, or areas differ without any.

    Source:
        DeLong et al., Biometrics 44:837 (1988); by mid-ranks after Sun and Xu, IEEE SPL 21:1389 (2014).
    """
    parts = np.zeros(len(is_positive), np.int64) if folds is None else folds
    areas, variance, num_pairs = np.zeros(2), 0.0, 0
    for part in np.unique(parts):
        inside = parts == part
        num = int(is_positive[inside].sum()) * int((~is_positive[inside]).sum())
        if num:
            found, spread = _areas(is_positive[inside], np.stack([first[inside], second[inside]]))
            # Folds have no subject in common, so their areas are independent.
            areas, variance, num_pairs = areas + num * found, variance + num**2 * spread, num_pairs + num
    areas, variance = areas / num_pairs, variance / num_pairs**2
    difference = areas[0] - areas[1]
    p = float(2 * norm.sf(abs(difference) / np.sqrt(variance))) if variance >= 1e-15 else float("nan")
    if variance < 1e-15 and abs(difference) < 1e-12:
        p = 1.0
    return DeLong(float(areas[0]), float(areas[1]), p)


def _areas(is_positive: Bools, scores: Floats) -> tuple[Floats, float]:
    """The areas of two scores (2, N), and the variance of their difference; NaN for a single subject of either side."""
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    of_positives, of_negatives = [], []
    for one in scores:
        positive, negative = one[is_positive], one[~is_positive]
        ranks = rankdata(np.concatenate([positive, negative]))
        # Share of the other side that each one beats: the structural components.
        of_positives.append((ranks[:num_positive] - rankdata(positive)) / num_negative)
        of_negatives.append(1 - (ranks[num_positive:] - rankdata(negative)) / num_positive)
    areas = np.mean(of_positives, axis=1)
    if min(num_positive, num_negative) < 2:
        return areas, float("nan")
    gaps = np.diff(of_positives, axis=0).var(ddof=1), np.diff(of_negatives, axis=0).var(ddof=1)
    return areas, float(gaps[0] / num_positive + gaps[1] / num_negative)
