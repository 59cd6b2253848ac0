"""What comes near by chance: limits learnt from few held-out frames, and what images beyond them mean for a set.

Frames of one subject resemble each other, so subjects are counted, not images: a held-out subject with its nearest
frame, a synthetic subject (that of the mask) with the share of its images that is near.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
from scipy.stats import betabinom, t

LOWEST_COPY_LIMIT: Final = 0.5
"""Below it two frames may still be two frames: the nearest of thousands of unrelated phantoms reach 0.46, real frames
of different places 0.29. Two scans of one place start here."""
HIGHEST_COPY_LIMIT: Final = 0.6
"""What a copy under noise as strong as the image itself still reaches; never more, however held-out frames look."""


@dataclass(frozen=True)
class ShareTest:
    """Do more images come near to training frames than would by chance."""

    limit: float
    """NCC of an image that is near: the ``order``-th highest of the held-out subjects."""
    order: int
    expected_share: float
    """Of independent images that are near: order / (held-out subjects + 1)."""
    num_near_images: int
    num_near_subjects: float
    """Sum over synthetic subjects of the share of their images that is near."""
    num_subjects: int
    p: float
    """Of so many or more of them, if the images were as independent of training as the held-out frames are."""
    lowest_p: float
    """If all were near: where this is above alpha, the counts are too small to find anything."""


def share_test(held_out: pd.DataFrame, synthetic: pd.DataFrame, false_alarm_rate: float) -> ShareTest:
    """Test the share of near images.

    If N held-out and M synthetic subjects came from one population, how many of the M lie beyond the k-th highest of
    the N would follow a beta-binomial law with a = k and b = N + 1 - k, whatever the distribution: the threshold is
    itself a random number, and this knows how random. A held-out subject counts with its highest frame and a
    synthetic one with a share rounded down in the sum, both of which make false alarms rarer.

    Args:
        held_out: Columns subject and ncc, a row per image.
        synthetic: Likewise.
        false_alarm_rate: Decides k: as many as this share of N + 1, at least one.

    Source:
        Wilks, Ann. Math. Stat. 13, 400 (1942): exceedances.
    """
    highest = np.sort(held_out.groupby("subject")["ncc"].max().to_numpy())[::-1]
    order = max(1, int(false_alarm_rate * (len(highest) + 1)))
    limit = float(highest[order - 1])
    is_near = synthetic["ncc"] > limit
    shares = is_near.groupby(synthetic["subject"]).mean()
    law = betabinom(len(shares), order, len(highest) + 1 - order)
    near_subjects = float(shares.sum())
    # A sum of shares such as 3 x 1/3 must not fall short of its whole number.
    beyond = law.sf(np.floor(near_subjects + 1e-9) - 1)
    return ShareTest(
        limit=limit,
        order=order,
        expected_share=order / (len(highest) + 1),
        num_near_images=int(is_near.sum()),
        num_near_subjects=near_subjects,
        num_subjects=len(shares),
        p=float(beyond),
        lowest_p=float(law.sf(len(shares) - 1)),
    )


def copy_limit(held_out: pd.DataFrame, num_images: int, alpha: float) -> float:
    """NCC from which on a single image is a copy, whatever the others are.

    The bound that none of ``num_images`` further independent images exceeds with probability 1 - alpha: a one-sided
    prediction bound of a normal law for Fisher's z, with the degrees of freedom of the held-out subjects, and within
    LOWEST_COPY_LIMIT and HIGHEST_COPY_LIMIT, as a tail cannot be learnt from few frames.

    Args:
        held_out: Columns subject and ncc, a row per image.
        num_images: Of the synthetic set.
        alpha: Probability that an independent set has an image beyond the bound.

    Source:
        Hahn and Meeker, Statistical Intervals (1991), prediction bounds; Bonferroni over the images.
    """
    num_subjects = held_out["subject"].nunique()
    z = np.arctanh(np.clip(held_out["ncc"].to_numpy(), -0.999, 0.999))
    if num_subjects < 2:
        return HIGHEST_COPY_LIMIT
    quantile = t.isf(alpha / max(num_images, 1), num_subjects - 1)
    bound = np.tanh(z.mean() + quantile * z.std(ddof=1) * np.sqrt(1 + 1 / num_subjects))
    return float(np.clip(bound, LOWEST_COPY_LIMIT, HIGHEST_COPY_LIMIT))
