"""By how much the nerves of an image are moved against those that its mask wanted."""

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import gaussian_filter

from ccmdist.ccm.skeleton import Bools

OFFSET_BLUR_PX = 1.0


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
