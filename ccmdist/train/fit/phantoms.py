"""The frames that the fits learn from and are judged by: phantoms of all clinical groups, from seeds of their own."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.ccm.phantom import make_phantom

SIZE_PX: Final = 128
FIRST_SEED: Final = 900_000_000
"""Of the fits; far from the seeds of shard sets, which count from small numbers."""
FIRST_HELD_OUT_SEED: Final = 990_000_000


@dataclass(frozen=True)
class Frames:
    """Some phantoms; one of each group in turn."""

    images: NDArray[np.uint8]
    """(N, H, W)."""
    nerve_masks: NDArray[np.uint8]
    """(N, H, W), 0 or 255: as they are shown to the VAE."""
    clinical_groups: tuple[ClinicalGroup, ...]


def fit_frames(count: int, seed: int) -> Frames:
    """Frames to learn from; another ``seed`` gives others."""
    return _frames(FIRST_SEED + seed * 100_000, count)


def held_out_frames(count: int) -> Frames:
    """Frames that no fit has seen, the same for all of them."""
    return _frames(FIRST_HELD_OUT_SEED, count)


def _frames(first_seed: int, count: int) -> Frames:
    groups = tuple(CLINICAL_GROUPS[index % len(CLINICAL_GROUPS)] for index in range(count))
    phantoms = [make_phantom(group, first_seed + index, SIZE_PX) for index, group in enumerate(groups)]
    masks = np.stack([phantom.nerve_mask for phantom in phantoms]).astype(np.uint8) * 255
    return Frames(np.stack([phantom.image for phantom in phantoms]), masks, groups)
