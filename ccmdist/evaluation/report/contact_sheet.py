"""The nearest pairs of a synthetic image and a training frame, for people to look at: a gate may be wrong.

The hole of a repaired frame is outlined: outside of it, the image is near to a real frame by design.
"""

from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.memorisation.likeness import moved
from ccmdist.evaluation.report.pictures import jpeg, outlined
from ccmdist.evaluation.sets import SourceFrames

NUM_PAIRS: Final = 4
MAX_PX: Final = 256
"""Edge of a picture on the sheet."""


def contact_sheets(comparison: Comparison) -> dict[str, list[dict[str, Any]]]:
    """Of each set that was judged, its nearest pairs: what is known of them, and three pictures as data URLs."""
    training = SourceFrames(replace(comparison.real, split="train"), comparison.shape)
    return {one.name: _pairs(comparison, one, training) for one in comparison.sets if one.gate and one.gate.figures}


def _pairs(comparison: Comparison, one: SetReport, training: SourceFrames) -> list[dict[str, Any]]:
    assert one.gate is not None and one.gate.figures is not None, "there are pairs"
    drawn, rows = SourceFrames(one.images, comparison.shape), []
    for pair in one.gate.figures.closest[:NUM_PAIRS]:
        image, frame = drawn.find(pair.key), training.find(pair.nearest_key)
        assert image is not None and frame is not None, "both were compared"
        move = (pair.flip, pair.turn_deg, (pair.down, pair.right))
        laid, is_shared = moved(image.image, *move), moved(np.full_like(image.image, 255), *move) > 127
        overlay = _overlay(*(_small(np.where(is_shared, one, 0)) for one in (laid, frame.image)))
        hole = None if image.inpaint_mask is None else _small(image.inpaint_mask.astype(np.uint8) * 255) > 127
        pictures = [outlined(_small(image.image), hole), _small(frame.image), overlay]
        rows.append(asdict(pair) | {"pictures": [jpeg(picture) for picture in pictures]})
    return rows


def _overlay(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Both in one picture: grey where they agree, black where they share nothing.

    Orange where the first is brighter, blue where the second is.
    """
    one, other = _levelled(first), _levelled(second)
    return np.stack([one, (one + other) / 2, other], axis=-1).round().astype(np.uint8)


def _levelled(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """With grey levels that can be compared."""
    low, high = np.percentile(picture, [1, 99.5])
    return np.asarray(np.clip((picture - low) * 255.0 / max(high - low, 1), 0, 255))


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    step = -(-max(picture.shape) // MAX_PX)
    height, width = (edge // step * step for edge in picture.shape)
    blocks = picture[:height, :width].reshape(height // step, step, width // step, step)
    return blocks.mean(axis=(1, 3)).round().astype(np.uint8)
