"""Simple ways to fill a hole: yardsticks for a model that fills it."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from ccmdist.ccm.skeleton import Bools

DRAWN: Final = "drawn"
FILLS: Final[dict[str, str]] = {
    DRAWN: "the model",
    "rim_mean": "mean of the rim",
    "biharmonic": "biharmonic",
    "other_frame": "another real frame",
}
"""What fills a hole and how tables name it: the model, the yardsticks of :func:`filled`, and the same place of a real
frame of another subject, whose grain is real and whose nerves are not those that belong there."""
RIM_PX: Final = 4
MAX_BIHARMONIC_PX: Final = 1 << 17
"""Of a hole; the equations of a larger one take minutes."""

Image = NDArray[np.uint8]


def filled(frame: Image, hole: Bools, other: Image | None) -> dict[str, Image]:
    """The frame with its hole filled in each simple way that there is.

    Args:
        frame: 8-bit grey, (H, W); what it holds in the hole is not looked at.
        hole: (H, W), at least one pixel.
        other: A frame of another subject, of the same shape; None if there is none.

    Returns:
        By the names of :data:`FILLS`. Where nothing surrounds the hole, neither its rim nor the biharmonic equation
        says anything.
    """
    found = {}
    if not hole.all():
        found["rim_mean"] = _rim_mean(frame, hole)
        if hole.sum() <= MAX_BIHARMONIC_PX:
            found["biharmonic"] = _biharmonic(frame, hole)
    if other is not None:
        found["other_frame"] = np.where(hole, other, frame)
    return found


def _rim_mean(frame: Image, hole: Bools) -> Image:
    rim = binary_dilation(hole, iterations=RIM_PX) & ~hole
    return np.where(hole, np.uint8(round(float(frame[rim].mean()))), frame)


def _biharmonic(frame: Image, hole: Bools) -> Image:
    """The smoothest surface that continues the rim, as scikit-image solves for it."""
    from skimage.restoration import inpaint_biharmonic

    surface = inpaint_biharmonic(np.where(hole, 0, frame / 255), hole)
    return np.where(hole, (surface * 255).round().astype(np.uint8), frame)
