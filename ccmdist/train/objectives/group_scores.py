"""How well groups are told apart, of probabilities: for curves of a run; the evaluation has intervals of its own."""

import numpy as np
from numpy.typing import NDArray


def group_scores(labels_N: NDArray[np.integer], probabilities_NK: NDArray[np.floating]) -> dict[str, float]:
    """``balanced_accuracy`` and ``macro_auc``, the means over the groups that occur.

    The area under the curve of a group is the share of pairs, one of it and one of the others, that are in order; ties
    count half. With a single group there is none.
    """
    present = sorted(set(labels_N.tolist()))
    found = probabilities_NK.argmax(axis=1)
    scores = {"balanced_accuracy": float(np.mean([(found[labels_N == one] == one).mean() for one in present]))}
    if len(present) > 1:
        scores["macro_auc"] = float(np.mean([_auc(labels_N == one, probabilities_NK[:, one]) for one in present]))
    return scores


def _auc(is_one_N: NDArray[np.bool_], scores_N: NDArray[np.floating]) -> float:
    differences = scores_N[is_one_N][:, None] - scores_N[~is_one_N][None, :]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())
