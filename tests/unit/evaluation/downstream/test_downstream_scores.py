"""Scores against torchmetrics, and their weights against images that are really there as often."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multiclass_calibration_error,
    multiclass_f1_score,
)

from ccmdist.evaluation.downstream.scores import (
    DIAGNOSIS,
    accuracy,
    auc,
    balanced_accuracy,
    calibration_error,
    diagnosis_scores,
    macro_auc,
    macro_f1,
    mean,
    overlaps,
)


def drawn(seed, num=60, levels=None):
    """Labels, each class at least twice, and probabilities; with ``levels``, of so few values that many are equal."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([[0, 0, 1, 1, 2, 2], rng.integers(0, 3, num - 6)])
    logits = rng.normal(0, 1, (num, 3)) + 1.2 * np.eye(3)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, np.round(probabilities * levels) / levels if levels else probabilities


def ones(num):
    return np.ones((1, num))


@pytest.mark.parametrize("seed", range(5))
def test_scores_of_a_diagnosis_are_those_of_torchmetrics(seed):
    labels, probabilities = drawn(seed)
    p, y = torch.from_numpy(probabilities), torch.from_numpy(labels)
    judges = {
        macro_auc: multiclass_auroc(p, y, 3, average="macro"),
        balanced_accuracy: multiclass_accuracy(p, y, 3, average="macro"),
        accuracy: multiclass_accuracy(p, y, 3, average="micro"),
        macro_f1: multiclass_f1_score(p, y, 3, average="macro"),
        calibration_error: multiclass_calibration_error(p, y, 3, n_bins=10, norm="l1"),
    }
    for score, judge in judges.items():
        assert score(ones(len(labels)), labels, probabilities)[0] == pytest.approx(float(judge), abs=1e-6), score


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from(sorted(DIAGNOSIS)))
def test_a_weight_counts_an_image_as_often_as_if_it_were_there(seed, name):
    labels, probabilities = drawn(seed, 24, levels=4)
    weights = np.random.default_rng(seed).integers(0, 4, len(labels))
    weights[:6] = np.maximum(weights[:6], 1)  # every class occurs
    repeated = np.repeat(np.arange(len(labels)), weights)
    whole = DIAGNOSIS[name](ones(len(repeated)), labels[repeated], probabilities[repeated])
    assert DIAGNOSIS[name](weights[None].astype(float), labels, probabilities) == pytest.approx(whole, abs=1e-12)


def test_many_resamplings_at_once_are_the_resamplings_one_by_one():
    labels, probabilities = drawn(3)
    weights = np.random.default_rng(0).integers(0, 3, (7, len(labels))).astype(float)
    for score in DIAGNOSIS.values():
        one_by_one = [score(row[None], labels, probabilities)[0] for row in weights]
        assert score(weights, labels, probabilities) == pytest.approx(one_by_one)


def test_an_area_counts_pairs_and_equal_ones_half():
    is_positive, scores = np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1])
    assert auc(ones(4), is_positive, scores) == pytest.approx(3.5 / 4)
    assert np.isnan(auc(np.array([[1.0, 1, 0, 0]]), is_positive, scores))


def test_an_area_with_folds_is_the_mean_of_theirs_by_pairs_however_sure_each_network_is():
    rng = np.random.default_rng(5)
    labels, probabilities = drawn(5)
    folds, weights = rng.integers(0, 3, len(labels)), rng.integers(0, 3, (4, len(labels))).astype(float)
    is_positive, scores = labels == 1, probabilities[:, 1]
    found = auc(weights, is_positive, scores, folds)
    areas = [auc(weights[:, folds == one], is_positive[folds == one], scores[folds == one]) for one in range(3)]
    pairs = [(weights * (folds == one) * side).sum(1) for side in (is_positive, ~is_positive) for one in range(3)]
    of_folds = np.array(pairs[:3]) * np.array(pairs[3:])
    assert found == pytest.approx((np.array(areas) * of_folds).sum(0) / of_folds.sum(0))
    # A network that says 0.1 where another one says 0.9 ranks its own images as before.
    assert auc(weights, is_positive, scores + 10 * folds, folds) == pytest.approx(found)
    assert abs(auc(weights, is_positive, scores + 10 * folds) - found).min() > 0.05
    assert diagnosis_scores(weights, labels, probabilities, folds).keys() == DIAGNOSIS.keys()


def test_a_mean_is_weighted():
    assert mean(np.array([[1.0, 3], [0, 1]]), np.array([0.0, 1])) == pytest.approx([0.75, 1])


def test_overlaps_of_known_masks_are_exact():
    found, wanted = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    found[2, :6], wanted[2, 2:] = True, True
    assert overlaps(found, wanted)["dice"] == pytest.approx(2 * 4 / 12)
    assert overlaps(found, wanted)["iou"] == 0.5
    assert overlaps(found & False, wanted & False) == {"dice": 1.0, "iou": 1.0, "cldice": 1.0}
    assert overlaps(found, wanted & False)["iou"] == 0
