"""Figures on memorisation that are told and decide nothing: authenticity, C_T, membership, duplicates."""

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.evaluation.statistics import interval

Floats = NDArray[np.floating[Any]]

DUPLICATE_NCC: Final = 0.6
"""Of two images without their nerves. Two textures of one mask reach 0.2, two scans of one place 0.6 and more."""
MIN_IN_CELL: Final = 8
"""Distances of either kind in a cell that counts in C_T."""


@dataclass(frozen=True)
class Membership:
    """Are training subjects nearer to the synthetic set than held-out ones, whose masks were not used either."""

    auc: float
    """Probability that a training subject is nearer than a held-out one; 0.5: nothing is told."""
    interval: tuple[float, float]
    """95 %, bootstrap of subjects of either kind."""
    num_training_subjects: int
    num_held_out_subjects: int


@dataclass(frozen=True)
class DuplicateRate:
    """Of one clinical group."""

    clinical_group: str
    num_images: int
    """Those that were looked at."""
    num_duplicates: int
    """Images that, without their nerves, show what another image of the set shows."""


def authentic(distances: Floats, spacings: Floats) -> NDArray[np.bool_]:
    """Which images are not just noisy copies: farther from their training frame than that is from the next one.

    Args:
        distances: Of each image to the training frame that is nearest to it.
        spacings: Of that training frame to the training frame that is nearest to it.

    Source:
        Alaa et al., ICML 2022 (arXiv:2102.08921), Section 3.3: authenticity. Half of independent images may fail it.
    """
    return np.asarray(distances > spacings)


def rank_z(first: Floats, second: Floats) -> float:
    """The Mann-Whitney statistic in units of its SD: negative if ``first`` tends to be smaller."""
    num_pairs = len(first) * len(second)
    spread = np.sqrt(num_pairs * (len(first) + len(second) + 1) / 12)
    return float((area(first, second) - 0.5) * num_pairs / spread)


def copying_statistic(
    synthetic: Floats, synthetic_cells: NDArray[np.intp], held_out: Floats, held_out_cells: NDArray[np.intp]
) -> float | None:
    """C_T: do synthetic images lie nearer to training frames than held-out frames do. Far below 0: they do.

    Args:
        synthetic: Distance of each synthetic image to the nearest training frame.
        synthetic_cells: The cell of the image space in which each lies.
        held_out: As ``synthetic``, of held-out frames.
        held_out_cells: Likewise.

    Returns:
        Mean of the rank statistics of the cells, weighted by held-out frames; None if no cell has enough of both.

    Source:
        Meehan, Chaudhuri, Dasgupta, AISTATS 2020 (arXiv:2004.05675), Section 4.2.
    """
    weights, values = [], []
    for cell in np.unique(held_out_cells):
        near, yardstick = synthetic[synthetic_cells == cell], held_out[held_out_cells == cell]
        if min(len(near), len(yardstick)) >= MIN_IN_CELL:
            weights.append(len(yardstick))
            values.append(rank_z(near, yardstick))
    return float(np.average(values, weights=weights)) if values else None


def membership(likeness: pd.DataFrame, num_bootstrap: int, rng: Generator) -> Membership:
    """The membership test by subject.

    Args:
        likeness: Columns subject, is_training, likeness: of each real frame with the synthetic image nearest to it.
        num_bootstrap: Resamplings of subjects.
        rng: Draws them.
    """
    means = likeness.groupby(["is_training", "subject"])["likeness"].mean()
    training, held_out = means[True].to_numpy(), means[False].to_numpy()
    draws = []
    for _ in range(num_bootstrap):
        draws.append(area(rng.choice(training, len(training)), rng.choice(held_out, len(held_out))))
    return Membership(area(training, held_out), interval(draws, 0.95), len(training), len(held_out))


def area(members: Floats, others: Floats) -> float:
    """Area under the ROC curve: the share of pairs in which the member has the larger value, ties counted half."""
    u = mannwhitneyu(members, others, method="asymptotic").statistic
    return float(u / (len(members) * len(others)))


def duplicate_rates(table: pd.DataFrame) -> tuple[DuplicateRate, ...]:
    """By clinical group, in the order of their names.

    Args:
        table: Columns clinical_group and ncc, of each image with its nearest other one.
    """
    groups = table.assign(clinical_group=table["clinical_group"].replace("", UNLABELLED)).groupby("clinical_group")
    return tuple(
        DuplicateRate(str(group), len(part), int((part["ncc"] >= DUPLICATE_NCC).sum())) for group, part in groups
    )
