"""Kernel distances between sets of features: unbiased at any number of images, as long as these are independent.

Frames of one subject are not: they add the same to the distance as to its floor, which is why that stands beside it.

N, M: images of the two sets. D: features of an image.
"""

from collections.abc import Callable
from typing import Final

import numpy as np

from ccmdist.ccm.skeleton import Floats

Kernel = Callable[[Floats, Floats], Floats]
CMMD_SIGMA: Final = 10.0
CMMD_SCALE: Final = 1000.0
BLOCK_ROWS: Final = 1024


def kernel_distance(first_ND: Floats, second_MD: Floats) -> float:
    """Squared MMD with the cubic kernel (x y / D + 1)^3; on Inception's pool features the Kernel Inception Distance.

    Source:
        Binkowski et al., ICLR 2018 (arXiv:1801.01401), section 3 and 4.
    """
    return squared_mmd(first_ND, second_MD, _cubic)


def cmmd(first_ND: Floats, second_MD: Floats) -> float:
    """1000 times the squared MMD with a Gaussian kernel of 10 between CLIP embeddings of unit length.

    Unbiased, as the paper defines it; the authors' code keeps the pairs of an image with itself, which at a few
    hundred images adds more than the distances that are looked for.

    Source:
        Jayasumana et al., CVPR 2024 (arXiv:2401.09603), section 4.
    """
    first, second = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in (first_ND, second_MD))
    return CMMD_SCALE * squared_mmd(first, second, _gaussian)


def squared_mmd(first_ND: Floats, second_MD: Floats, kernel: Kernel) -> float:
    """Squared maximum mean discrepancy without the pairs of an image with itself: unbiased, and negative by chance.

    Source:
        Gretton et al., JMLR 2012, Eq. 3.
    """
    first, second = np.asarray(first_ND, np.float64), np.asarray(second_MD, np.float64)
    within = [
        _sum(values, values, kernel, is_same=True) / (len(values) * (len(values) - 1)) for values in (first, second)
    ]
    across = _sum(first, second, kernel, is_same=False) / (len(first) * len(second))
    return within[0] + within[1] - 2 * across


def _sum(first: Floats, second: Floats, kernel: Kernel, is_same: bool) -> float:
    total = 0.0
    for start in range(0, len(first), BLOCK_ROWS):
        values = kernel(first[start : start + BLOCK_ROWS], second)
        if is_same:
            rows = np.arange(len(values))
            values[rows, start + rows] = 0.0
        total += float(values.sum())
    return total


def _cubic(first: Floats, second: Floats) -> Floats:
    return np.asarray((first @ second.T / first.shape[1] + 1) ** 3)


def _gaussian(first: Floats, second: Floats) -> Floats:
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.asarray(np.exp(-squares / (2 * CMMD_SIGMA**2)))
