"""What all cells of an arm say of the test images of all folds, in one order that every arm shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ccmdist.ccm.groups import CLINICAL_GROUPS, UNLABELLED
from ccmdist.ccm.skeleton import Floats
from ccmdist.config.evaluate import Task
from ccmdist.evaluation.downstream.cells import PROBABILITIES, CellResult
from ccmdist.evaluation.downstream.scores import SEGMENTATION, Labels


@dataclass(frozen=True)
class Pooled:
    """S seeds, N images, M subjects, C clinical groups."""

    subjects: tuple[str, ...]
    """Sorted."""
    subject_of_image: Labels
    """(N,), places in :attr:`subjects`."""
    labels: Labels
    """(N,), places in CLINICAL_GROUPS; one more for images without a group."""
    fold_of_image: Labels
    """(N,), number of the fold that tests each image."""
    probabilities: Floats
    """(S, N, C) of a diagnosis; (S, N, 0) otherwise."""
    values: dict[str, Floats]
    """Scores of images, (S, N), of a segmentation; empty otherwise."""

    @cached_property
    def subject_labels(self) -> Labels:
        """(M,)."""
        labels = np.zeros(len(self.subjects), np.int64)
        labels[self.subject_of_image] = self.labels
        return labels

    @cached_property
    def fold_of_subject(self) -> Labels:
        """(M,)."""
        folds = np.zeros(len(self.subjects), np.int64)
        folds[self.subject_of_image] = self.fold_of_image
        return folds

    @cached_property
    def of_subjects(self) -> Floats:
        """(S, M, C): mean of the probabilities of each subject's frames."""
        membership = np.eye(len(self.subjects))[self.subject_of_image]
        return np.asarray((membership / membership.sum(0)).T @ self.probabilities)

    @property
    def mean_of_subjects(self) -> Floats:
        """(M, C): mean over the seeds too."""
        return np.asarray(self.of_subjects.mean(0))

    @property
    def subjects_by_group(self) -> dict[str, int]:
        """Number of subjects of each clinical group that occurs."""
        names = (*CLINICAL_GROUPS, UNLABELLED)
        return {names[label]: int((self.subject_labels == label).sum()) for label in np.unique(self.subject_labels)}


def pooled(task: Task, results: Sequence[CellResult], seeds: Sequence[int], folds: Sequence[int]) -> Pooled:
    """The test images of all cells of an arm.

    Args:
        task: That was learnt.
        results: Of the cells.
        seeds: Of each cell, the number of its seed.
        folds: Likewise, of its fold.
    """
    cells = [(seed, one.table.assign(fold=fold)) for one, seed, fold in zip(results, seeds, folds, strict=True)]
    tables = [
        pd.concat([table for seed, table in cells if seed == one]).sort_values("key") for one in sorted(set(seeds))
    ]
    first = tables[0]
    subjects, places = np.unique(first["subject"].to_numpy(str), return_inverse=True)
    order = {group: place for place, group in enumerate([*CLINICAL_GROUPS, ""])}
    columns = list(PROBABILITIES) if task == "diagnosis" else []
    names = SEGMENTATION if task == "segmentation" else ()
    return Pooled(
        subjects=tuple(map(str, subjects)),
        subject_of_image=places.astype(np.int64),
        labels=first["clinical_group"].map(order).to_numpy(np.int64),
        fold_of_image=first["fold"].to_numpy(np.int64),
        probabilities=np.stack([table[columns].to_numpy(np.float64) for table in tables]),
        values={name: np.stack([table[name].to_numpy(np.float64) for table in tables]) for name in names},
    )
