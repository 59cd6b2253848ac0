"""Are biomarkers of synthetic images equivalent to those of real ones: two one-sided tests against stated margins.

"Not significantly different" is not "equivalent": with few subjects nothing is significant. So both are tested, and
both are reported. Frames of one subject are not independent, so a subject counts once, with the mean of its frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
import pandas as pd
from numpy.random import Generator

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.skeleton import Floats
from ccmdist.evaluation.biomarkers.power import subjects_needed, tost_power
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.statistics import bootstrap_interval, holm, paired_interval, subject_means

Verdict = Literal["equivalent", "equivalent, but different", "different", "inconclusive"]
ALL_SUBJECTS: Final = "all"


@dataclass(frozen=True)
class Equivalence:
    """One biomarker in one clinical group, or over all subjects, of one synthetic set."""

    biomarker: str
    clinical_group: str
    """Or ALL_SUBJECTS."""
    num_real_subjects: int
    num_synthetic_subjects: int
    num_real_images: int
    num_synthetic_images: int
    real_mean: float
    """Mean over subjects of the means of their frames."""
    synthetic_mean: float
    real_sd: float
    """Between the means of subjects."""
    difference: float
    """Synthetic minus real."""
    interval: tuple[float, float]
    """Of the difference, at level 1 - 2 alpha: about where it lies within the margin, the test finds equivalence at
    alpha. Bootstrap of the subjects of either set."""
    paired_interval: tuple[float, float] | None
    """The same with each subject drawn into both sets at once. None if the sets have different subjects."""
    margin: float
    """A fraction of the observed real mean, taken as known. As that mean is an estimate too, tests at 0.05 take 5.5 %
    of sets that lie on a margin of 6 % for equivalent, and 6.8 % of those on one of 20 %."""
    tost_p: float
    """Of the hypothesis that the means differ by the margin or more. Small: equivalent."""
    paired_tost_p: float | None
    """Likewise of the mean difference within subjects. None if the sets have different subjects."""
    difference_p: float
    """Of the hypothesis that the means are equal. Small: different."""
    tost_p_holm: float
    """The same after Holm's correction over all biomarkers and groups of the set."""
    paired_tost_p_holm: float | None
    difference_p_holm: float
    power: float
    """Of finding equivalence with these subjects (independent sets, uncorrected) if there were no difference at all."""
    subjects_needed: int
    """Per set, for that power to be 90 %."""
    verdict: Verdict
    """By the tests that take the sets as independent, after Holm's correction."""
    equivalent_when_paired: bool | None
    """By the paired test, after Holm's correction."""


def equivalence_of_set(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    prefix: str,
    margins: dict[str, float],
    alpha: float,
    min_subjects: int,
    num_bootstrap: int,
    rng: Generator,
) -> tuple[list[Equivalence], list[LeftOut]]:
    """Every biomarker, over all subjects and within each clinical group.

    Args:
        real: A row per real image, with columns subject, clinical_group and ``prefix + biomarker``.
        synthetic: Likewise; the subject is that of the mask.
        prefix: Of the columns that are compared.
        margins: Of each biomarker, as a fraction of the real mean of the same group.
        alpha: Level of both tests.
        min_subjects: On either side, below which a comparison is left out.
        num_bootstrap: Resamplings of subjects for the interval.
        rng: Draws them.

    Returns:
        The comparisons, and what was left out with the reason.
    """
    rows: list[Equivalence] = []
    left_out = _unlabelled(real, synthetic)
    for group, real_part, synthetic_part in _groups(real, synthetic):
        for biomarker, fraction in margins.items():
            column = prefix + biomarker
            found = _compared(real_part, synthetic_part, column, fraction, alpha, min_subjects, num_bootstrap, rng)
            if isinstance(found, str):
                left_out.append(LeftOut(f"{QUANTITIES[biomarker].label}, {_told(group)}", found))
            else:
                rows.append(replace(found, biomarker=biomarker, clinical_group=group))
    return _corrected(rows, alpha), left_out


def _groups(real: pd.DataFrame, synthetic: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    yield ALL_SUBJECTS, real, synthetic
    for group in CLINICAL_GROUPS:
        parts = [table[table["clinical_group"] == group] for table in (real, synthetic)]
        if any(len(part) for part in parts):
            yield group, parts[0], parts[1]


def _told(group: str) -> str:
    return "all subjects" if group == ALL_SUBJECTS else group


def _unlabelled(real: pd.DataFrame, synthetic: pd.DataFrame) -> list[LeftOut]:
    left_out = []
    for what, table in (("real", real), ("synthetic", synthetic)):
        num = table.loc[table["clinical_group"] == "", "subject"].nunique()
        if num:
            total = table["subject"].nunique()
            reason = f"{num} of {total} {what} subjects are unlabelled; they count in the rows of all subjects only"
            left_out.append(LeftOut("equivalence per clinical group", reason))
    return left_out


def _compared(
    real: pd.DataFrame,
    synthetic: pd.DataFrame,
    column: str,
    fraction: float,
    alpha: float,
    min_subjects: int,
    num_bootstrap: int,
    rng: Generator,
) -> Equivalence | str:
    """The comparison without corrected p values, or why there is none."""
    first, second = subject_means(real, column), subject_means(synthetic, column)
    if min(len(first), len(second)) < min_subjects:
        have = f"{len(first)} real and {len(second)} synthetic subjects have a value"
        return f"{have}, at least {min_subjects} each are needed"
    margin = fraction * abs(float(first.mean()))
    if margin < 1e-12:
        return "the real mean is zero, and so is a margin that is a fraction of it"
    if first.std() < 1e-12 and second.std() < 1e-12:
        return "the subjects do not differ at all within either set, so there is nothing to test with"
    tost_p, difference_p = welch_tests(second.to_numpy(), first.to_numpy(), margin)
    is_paired = first.index.equals(second.index)
    level = 1 - 2 * alpha
    return Equivalence(
        biomarker="",
        clinical_group="",
        num_real_subjects=len(first),
        num_synthetic_subjects=len(second),
        num_real_images=int(real[column].notna().sum()),
        num_synthetic_images=int(synthetic[column].notna().sum()),
        real_mean=float(first.mean()),
        synthetic_mean=float(second.mean()),
        real_sd=float(first.std()),
        difference=float(second.mean() - first.mean()),
        interval=bootstrap_interval(second.to_numpy(), first.to_numpy(), level, num_bootstrap, rng),
        paired_interval=paired_interval((second - first).to_numpy(), level, num_bootstrap, rng) if is_paired else None,
        margin=margin,
        tost_p=tost_p,
        paired_tost_p=paired_tost((second - first).to_numpy(), margin) if is_paired else None,
        difference_p=difference_p,
        tost_p_holm=1.0,
        paired_tost_p_holm=None,
        difference_p_holm=1.0,
        power=tost_power((float(first.std()), float(second.std())), (len(first), len(second)), margin, alpha),
        subjects_needed=subjects_needed(float(np.sqrt((first.var() + second.var()) / 2)), margin, alpha),
        verdict="inconclusive",
        equivalent_when_paired=None,
    )


def welch_tests(synthetic: Floats, real: Floats, margin: float) -> tuple[float, float]:
    """The p of two one-sided t tests against +-margin, and of the two-sided one; variances may differ (Welch).

    Both take the subjects of the two sets as independent samples of a population. Where synthetic images were drawn
    from masks of the real subjects that is cautious: equivalence is found less often than by :func:`paired_tost`.
    """
    from statsmodels.stats.weightstats import ttest_ind, ttost_ind

    tost_p = ttost_ind(synthetic, real, -margin, margin, usevar="unequal")[0]
    return float(tost_p), float(ttest_ind(synthetic, real, usevar="unequal")[1])


def paired_tost(differences: Floats, margin: float) -> float:
    """The p of two one-sided t tests of the mean difference within subjects against +-margin.

    It asks whether drawing an image from a subject's mask changes that subject's biomarker, for subjects like these.
    """
    from statsmodels.stats.weightstats import ttost_paired

    if np.ptp(differences) < 1e-12 * margin:
        # Without spread there is no t statistic; the difference itself is known.
        return 0.0 if abs(differences[0]) < margin else 1.0
    return float(ttost_paired(differences, np.zeros_like(differences), -margin, margin)[0])


def _corrected(rows: list[Equivalence], alpha: float) -> list[Equivalence]:
    tost = holm([row.tost_p for row in rows])
    difference = holm([row.difference_p for row in rows])
    with_pairs = [row for row in rows if row.paired_tost_p is not None]
    paired = dict(
        zip(
            map(id, with_pairs),
            holm([row.paired_tost_p for row in with_pairs if row.paired_tost_p is not None]),
            strict=True,
        )
    )
    return [
        replace(
            row,
            tost_p_holm=p,
            difference_p_holm=q,
            paired_tost_p_holm=paired.get(id(row)),
            equivalent_when_paired=paired[id(row)] < alpha if id(row) in paired else None,
            verdict=_verdict(p < alpha, q < alpha),
        )
        for row, p, q in zip(rows, tost, difference, strict=True)
    ]


def _verdict(is_equivalent: bool, is_different: bool) -> Verdict:
    if is_equivalent:
        return "equivalent, but different" if is_different else "equivalent"
    return "different" if is_different else "inconclusive"
