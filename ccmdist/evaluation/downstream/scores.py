"""Scores of diagnoses and segmentations, with weights of images: one definition for a score and for its resamplings.

A resampling of subjects is a weight for each image, how often its subject was drawn. So a score takes weights of shape
(B, N), B resamplings of N images, and gives B values; weights of one are the score itself. NaN where it is not defined.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.overlap import centreline_dice, dice
from ccmdist.ccm.skeleton import Bools, Floats

Labels = NDArray[np.int64]
NUM_BINS: Final = 10
"""Of the calibration error: bins of equal width over the probability of the predicted class."""

Score = Callable[[Floats, Labels, Floats], Floats]
"""Weights (B, N), labels (N,), probabilities (N, C) -> values (B,)."""


def macro_auc(weights: Floats, labels: Labels, probabilities: Floats, folds: Labels | None = None) -> Floats:
    """Area under the ROC curve of each class against the rest, mean over the classes that occur.

    Of pairs of an image of the class and another one, the share in which the former has the higher probability of the
    class; equal ones count half. 0.5 is chance. With ``folds`` (N,), only pairs of one fold count: the networks of two
    folds need not be equally sure of themselves, and across them even perfect ranks would be mixed up.

    Source:
        Hanley and McNeil 1982; macro average, one versus rest. Folds: Forman and Scholz, SIGKDD Explorations 12:49
        (2010).
    """
    classes = np.unique(labels)
    return np.mean([auc(weights, labels == one, probabilities[:, one], folds) for one in classes], axis=0)


def auc(weights: Floats, is_positive: Bools, scores: Floats, folds: Labels | None = None) -> Floats:
    """Area under the ROC curve of one class against the rest; arguments as of :func:`macro_auc`."""
    parts = np.zeros(len(scores), np.int64) if folds is None else folds
    wins, pairs = np.zeros(len(weights)), np.zeros(len(weights))
    for part in np.unique(parts):
        of_positive, of_negative = (np.flatnonzero(side & (parts == part)) for side in (is_positive, ~is_positive))
        positive, negative = scores[of_positive][:, None], scores[of_negative][None]
        first, second = weights[:, of_positive], weights[:, of_negative]
        wins += (first @ ((positive > negative) + 0.5 * (positive == negative)) * second).sum(1)
        pairs += first.sum(1) * second.sum(1)
    return _over(wins, pairs)


def balanced_accuracy(weights: Floats, labels: Labels, probabilities: Floats) -> Floats:
    """Mean over the classes of the share of their images that are recognised."""
    confusion = _confusion(weights, labels, probabilities)
    return np.mean([_over(confusion[:, one, one], confusion[:, one].sum(1)) for one in np.unique(labels)], axis=0)


def accuracy(weights: Floats, labels: Labels, probabilities: Floats) -> Floats:
    """Share of the images that are recognised."""
    return _over(weights @ (probabilities.argmax(1) == labels), weights.sum(1))


def macro_f1(weights: Floats, labels: Labels, probabilities: Floats) -> Floats:
    """Harmonic mean of precision and sensitivity of each class, mean over the classes that occur."""
    confusion = _confusion(weights, labels, probabilities)
    found = []
    for one in np.unique(labels):
        total = confusion[:, one].sum(1) + confusion[:, :, one].sum(1)
        found.append(_over(2 * confusion[:, one, one], total))
    return np.mean(found, axis=0)


def calibration_error(weights: Floats, labels: Labels, probabilities: Floats) -> Floats:
    """Expected calibration error: mean gap between the probability of the predicted class and how often it is right.

    Source:
        Guo et al., ICML 2017 (arXiv:1706.04599), Eq. 3; 10 bins.
    """
    confidence = probabilities.max(1)
    gap = (probabilities.argmax(1) == labels) - confidence
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [np.abs(weights[:, bins == one] @ gap[bins == one]) for one in range(NUM_BINS)]
    return _over(np.sum(gaps, axis=0), weights.sum(1))


def mean(weights: Floats, values: Floats) -> Floats:
    """Weighted mean over the images of a value that each image has; (B,)."""
    return _over(weights @ values, weights.sum(1))


DIAGNOSIS: Final[dict[str, Score]] = {
    "macro_auc": macro_auc,
    "balanced_accuracy": balanced_accuracy,
    "accuracy": accuracy,
    "macro_f1": macro_f1,
    "calibration_error": calibration_error,
}
"""Of all images as those of one fold; see :func:`diagnosis_scores`."""
SEGMENTATION: Final = ("dice", "iou", "cldice")


def diagnosis_scores(weights: Floats, labels: Labels, probabilities: Floats, folds: Labels) -> dict[str, Floats]:
    """All scores of DIAGNOSIS; ``folds`` (N,) says which images one network was tested on."""
    plain = {name: score(weights, labels, probabilities) for name, score in DIAGNOSIS.items() if score is not macro_auc}
    return {"macro_auc": macro_auc(weights, labels, probabilities, folds), **plain}


def overlaps(found: Bools, wanted: Bools) -> dict[str, float]:
    """Dice, IoU and clDice of the nerves found in one image; 1 if there are none and none are found."""
    union = int((found | wanted).sum())
    iou = int((found & wanted).sum()) / union if union else 1.0
    return {"dice": dice(found, wanted), "iou": iou, "cldice": centreline_dice(found, wanted)}


def _confusion(weights: Floats, labels: Labels, probabilities: Floats) -> Floats:
    """(B, C, C): weight of the images by class and predicted class."""
    num = probabilities.shape[1]
    cells = np.eye(num * num)[labels * num + probabilities.argmax(1)]
    return np.asarray((weights @ cells).reshape(-1, num, num))


def _over(part: Floats, whole: Floats) -> Floats:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)
