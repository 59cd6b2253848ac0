"""The one frozen segmenter: nerves of an image by an oriented ridge filter, without weights and without training.

Real and synthetic images are compared through the same segmenter or not at all: biomarkers swing by factors with a
ridge filter's thresholds. Whoever changes anything here changes SEGMENTER_VERSION, and reports of different versions
are not comparable. What it finds is no expert's annotation.
"""

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import distance_transform_edt, gaussian_filter, label
from skimage.filters import apply_hysteresis_threshold
from skimage.morphology import skeletonize

SEGMENTER_VERSION: Final = "ridge-1"

NUM_ORIENTATIONS: Final = 16
RIDGE_SIGMAS_PX: Final = (1.2, 1.8)
"""Standard deviations across the ridge: between them they fit nerves of 2 to 5 px in width."""
ALONG_SIGMA_PX: Final = 4.0
"""Standard deviation along the ridge of each of two filters, one ahead and one behind."""
HALF_REACH_PX: Final = 4.0
"""How far ahead and behind they stand: a fibre has to be seen on both sides."""
BACKGROUND_SIGMA_PX: Final = 14.0
SPREAD_SIGMA_PX: Final = 20.0
MIN_SPREAD_GREY: Final = 2.0
"""Floor of the local standard deviation in grey levels, so that a flat image has no nerves."""
WEAK_RESPONSE: Final = 3.8
STRONG_RESPONSE: Final = 6.5
"""Hysteresis in units of the local standard deviation; a ridge is kept where it is strong somewhere."""
MIN_LENGTH_PX: Final = 24
MAX_HALF_WIDTH_PX: Final = 3.0
EDGE_SHARE: Final = 0.6
"""A nerve reaches as far from its centreline as the response stays above this share of that on the centreline."""

_PADDING_PX = 24
_EIGHT_NEIGHBOURS = np.ones((3, 3), bool)
Floats = NDArray[np.float32]


def segment(image: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The nerve mask of an image, at its native pixel size.

    Args:
        image: 8-bit grey, shape (H, W) from 64 to 1024 px; a nerve is 2 to 5 px wide.

    Returns:
        True on nerves, shape (H, W); as wide as the ridge looks, so width is seen and not assumed.

    Raises:
        ValueError: If the image is not 8-bit grey of two dimensions.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"image has dtype {image.dtype} and shape {image.shape}, expected uint8 of shape (H, W)")
    response = ridge_response(image)
    centreline = _long(skeletonize(apply_hysteresis_threshold(response, WEAK_RESPONSE, STRONG_RESPONSE)))
    if not centreline.any():
        return centreline
    distance, nearest = distance_transform_edt(~centreline, return_indices=True)
    reaches = response >= EDGE_SHARE * response[tuple(nearest)]
    mask: NDArray[np.bool_] = (distance <= MAX_HALF_WIDTH_PX) & reaches
    return mask


def ridge_response(image: NDArray[np.uint8]) -> Floats:
    """Largest response over orientations and widths, shape (H, W), in units of the local standard deviation."""
    contrast = _normalised(image)
    padded_shape = _padded_shape(image.shape)
    margins = [
        (_PADDING_PX, padded - size - _PADDING_PX) for padded, size in zip(padded_shape, image.shape, strict=True)
    ]
    spectrum = fft.rfft2(np.pad(contrast, margins, mode="symmetric"))
    best = np.full(image.shape, -np.inf, np.float32)
    for angle, transfer in _transfer_functions(padded_shape):
        response = fft.irfft2(spectrum * transfer, padded_shape)
        ahead, behind = (_moved(response, image.shape, sign * HALF_REACH_PX, angle) for sign in (1, -1))
        # A bright point has a response all round it, a fibre on both sides: the smaller of the two tells them apart.
        np.maximum(best, np.minimum(ahead, behind), out=best)
    return best


def _moved(response: Floats, shape: tuple[int, ...], distance_px: float, angle: float) -> Floats:
    """The response without its padding, seen from a place farther along the ridge."""
    offsets = (distance_px * np.sin(angle), distance_px * np.cos(angle))
    rows, columns = (_PADDING_PX + round(float(offset)) for offset in offsets)
    return response[rows : rows + shape[0], columns : columns + shape[1]]


def _normalised(image: NDArray[np.uint8]) -> Floats:
    """The image minus its background, over its local standard deviation."""
    grey = image.astype(np.float32)
    detail = grey - _smoothed(grey, BACKGROUND_SIGMA_PX)
    spread = np.sqrt(np.maximum(_smoothed(detail**2, SPREAD_SIGMA_PX), 0))
    normalised: Floats = detail / np.maximum(spread, MIN_SPREAD_GREY)
    return normalised


def _smoothed(values: Floats, sigma_px: float) -> Floats:
    smooth: Floats = gaussian_filter(values, sigma_px, truncate=3.0)
    return smooth


def _padded_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    height, width = (fft.next_fast_len(size + 2 * _PADDING_PX, real=True) for size in shape)
    return height, width


@lru_cache(maxsize=4)
def _transfer_functions(shape: tuple[int, int]) -> tuple[tuple[float, Floats], ...]:
    """Angles, and filters in frequency space, which are real because each kernel is symmetric about its centre."""
    angles = [float(np.pi * index / NUM_ORIENTATIONS) for index in range(NUM_ORIENTATIONS)]
    return tuple((angle, _transfer_function(shape, sigma, angle)) for sigma in RIDGE_SIGMAS_PX for angle in angles)


def _transfer_function(shape: tuple[int, int], sigma_px: float, angle: float) -> Floats:
    """A ridge of negative curvature across, Gaussian along, zero mean and unit energy."""
    y, x = np.meshgrid(*(fft.fftfreq(size) * size for size in shape), indexing="ij")
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    across = across / sigma_px
    kernel = (1 - across**2) * np.exp(-(across**2) / 2) * np.exp(-((along / ALONG_SIGMA_PX) ** 2) / 2)
    kernel -= kernel.mean()
    spectrum = fft.rfft2(kernel / np.sqrt((kernel**2).sum()))
    return np.asarray(spectrum.real, np.float32)


def _long(centreline: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The connected pieces of the centreline that are long enough to be nerves."""
    labels, _ = label(centreline, _EIGHT_NEIGHBOURS)
    is_long = np.bincount(labels.ravel()) >= MIN_LENGTH_PX
    is_long[0] = False
    kept: NDArray[np.bool_] = is_long[labels]
    return kept
