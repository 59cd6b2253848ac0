"""Whether images lie where real ones lie, and whether they lie everywhere real ones do: by nearest neighbours."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from ccmdist.ccm.skeleton import Floats

MANIFOLD_NEIGHBOURS: Final = 3
"""k of precision and recall, as their paper has it."""
DENSITY_NEIGHBOURS: Final = 5
"""k of density and coverage, as theirs has it."""
FEWEST_IMAGES: Final = DENSITY_NEIGHBOURS + 1


@dataclass(frozen=True)
class Neighbourhoods:
    """Four shares; 1 is best, and density may be more."""

    precision: float
    """Synthetic images that lie in the ball of a real one, which reaches to its 3rd nearest real neighbour."""
    recall: float
    """Real images that lie in such a ball of a synthetic one."""
    density: float
    """Real balls (5th neighbour) around a synthetic image, over the 5 that are expected where both are alike."""
    coverage: float
    """Real balls (5th neighbour) that hold a synthetic image."""


def neighbourhoods(real_ND: Floats, synthetic_MD: Floats) -> Neighbourhoods:
    """Precision, recall, density and coverage; each set needs at least FEWEST_IMAGES.

    Source:
        Kynkaanniemi et al., NeurIPS 2019 (arXiv:1904.06991), Eq. 1 and 2; Naeem et al., ICML 2020 (arXiv:2002.09797),
        Eq. 3 and 5.
    """
    centre = real_ND.mean(axis=0)
    real, synthetic = np.asarray(real_ND - centre, np.float64), np.asarray(synthetic_MD - centre, np.float64)
    across = _squares(real, synthetic)
    within_real, within_synthetic = _squares(real, real), _squares(synthetic, synthetic)
    manifold = _radii(within_real, MANIFOLD_NEIGHBOURS)[:, None]
    balls = across <= _radii(within_real, DENSITY_NEIGHBOURS)[:, None]
    return Neighbourhoods(
        precision=float((across <= manifold).any(axis=0).mean()),
        recall=float((across <= _radii(within_synthetic, MANIFOLD_NEIGHBOURS)).any(axis=1).mean()),
        density=float(balls.sum(axis=0).mean() / DENSITY_NEIGHBOURS),
        coverage=float(balls.any(axis=1).mean()),
    )


def _squares(first: Floats, second: Floats) -> Floats:
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1) - 2 * first @ second.T
    return np.asarray(np.maximum(squares, 0.0))


def _radii(within: Floats, neighbours: int) -> Floats:
    """Squared distance of each image to its so many-th nearest other one; itself comes first in its row."""
    others = within.copy()
    np.fill_diagonal(others, -1.0)
    return np.asarray(np.partition(others, neighbours, axis=1)[:, neighbours])
