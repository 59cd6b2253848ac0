"""Do the nerves of an image lie where its mask wanted them: overlap of areas and of centrelines, offset."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from ccmdist.ccm.skeleton import Bools, centreline_of

OFFSET_BLUR_PX: Final = 1.0


def dice(found: Bools, wanted: Bools) -> float:
    """Twice the common area over the sum of the areas; 1 if both are empty."""
    total = int(found.sum()) + int(wanted.sum())
    return 2 * int((found & wanted).sum()) / total if total else 1.0


def centreline_dice(found: Bools, wanted: Bools) -> float:
    """clDice: harmonic mean of the share of each mask's centreline that lies in the other mask; 1 if both are empty.

    Thin nerves that lie one pixel beside the wanted place cost Dice a third, and clDice little.

    Source:
        Shit et al., CVPR 2021 (arXiv:2003.07311), Eq. 1 and 2.
    """
    if not found.any() and not wanted.any():
        return 1.0
    precision, sensitivity = _share_inside(found, wanted), _share_inside(wanted, found)
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def _share_inside(mask: Bools, other: Bools) -> float:
    centreline = centreline_of(mask)
    return float(other[centreline].mean()) if centreline.any() else 0.0


def offset_px(found: Bools, wanted: Bools) -> NDArray[np.float64]:
    """How far the found nerves are moved against the wanted ones, (down, right) in whole pixels.

    The highest peak of the phase correlation of the two masks, blurred, within a Hann window. Along a single straight
    nerve the offset cannot be seen. NaN if either mask is empty.

    Source:
        Kuglin and Hines 1975, phase correlation.
    """
    if not found.any() or not wanted.any():
        return np.full(2, np.nan)
    cross = _spectrum(found) * np.conj(_spectrum(wanted))
    # Whitened where the masks have something to say; elsewhere a pure phase would be noise.
    correlation = fft.irfft2(cross / (np.abs(cross) + 0.05 * np.abs(cross).max()), found.shape)
    peak = np.unravel_index(int(correlation.argmax()), found.shape)
    return np.array([at if at <= size // 2 else at - size for at, size in zip(peak, found.shape, strict=True)], float)


def _spectrum(mask: Bools) -> NDArray[np.complex128]:
    smooth = gaussian_filter(mask.astype(float), OFFSET_BLUR_PX)
    # Without a window the frame's own border, which never moves, would pull the peak to zero.
    window = np.outer(*(np.hanning(size) for size in mask.shape))
    return np.asarray(fft.rfft2((smooth - smooth.mean()) * window))
