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


def delong(is_positive: Bools, first: Floats, second: Floats) -> DeLong:
    """Two correlated areas under the ROC curve, compared.

    Args:
        is_positive: (N,), whether each subject is of the class.
        first: (N,), its probability by one network.
        second: By the other.

    Returns:
        The areas and the p; 1 where the two rank all subjects alike.

    Source:
        DeLong et al., Biometrics 44:837 (1988); by mid-ranks after Sun and Xu, IEEE SPL 21:1389 (2014).
    """
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    areas, of_positives, of_negatives = [], [], []
    for scores in (first, second):
        positive, negative = scores[is_positive], scores[~is_positive]
        ranks = rankdata(np.concatenate([positive, negative]))
        # Share of the other side that each one beats: the structural components.
        beaten = (ranks[:num_positive] - rankdata(positive)) / num_negative
        losing = 1 - (ranks[num_positive:] - rankdata(negative)) / num_positive
        areas.append(float(beaten.mean()))
        of_positives.append(beaten)
        of_negatives.append(losing)
    if min(num_positive, num_negative) < 2:
        return DeLong(areas[0], areas[1], float("nan"))
    covariance = np.cov(of_positives) / num_positive + np.cov(of_negatives) / num_negative
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    difference = areas[0] - areas[1]
    if variance < 1e-15:
        return DeLong(areas[0], areas[1], 1.0 if abs(difference) < 1e-12 else 0.0)
    return DeLong(areas[0], areas[1], float(2 * norm.sf(abs(difference) / np.sqrt(variance))))
