"""The one frozen segmenter: nerves of an image by an oriented ridge filter, without weights and without training.

Real and synthetic images are compared through the same segmenter or not at all: biomarkers swing by factors with a
ridge filter's thresholds. Whoever changes anything here changes SEGMENTER_VERSION, and reports of different versions
are not comparable. What it finds is no expert's annotation.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import distance_transform_edt, gaussian_filter
from skimage.filters import apply_hysteresis_threshold

from ccmdist.ccm.skeleton import pruned, without_dust

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
WEAK_RESPONSE: Final = 3.3
STRONG_RESPONSE: Final = 6.5
"""Hysteresis in units of the local standard deviation; a ridge is kept where it is strong somewhere."""
MIN_LENGTH_PX: Final = 24
MAX_SPUR_PX: Final = 8
MAX_HALF_WIDTH_PX: Final = 3.0
PROFILE_SIGMA_PX: Final = 0.6
"""Standard deviation across the nerve by which its profile is smoothed before its width is read."""
EDGE_SHARE: Final = 0.6
"""A nerve's edge is where its brightness falls below this share of that on the centreline. More than a half, because
the average over pixels and over small bends of the nerve widens its profile."""
ANGLES: Final = tuple(float(np.pi * index / NUM_ORIENTATIONS) for index in range(NUM_ORIENTATIONS))

_PADDING_PX = 24
Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


def segment(image: NDArray[np.uint8]) -> Bools:
    """The nerve mask of an image, at its native pixel size.

    Args:
        image: 8-bit grey, shape (H, W) from 64 to 1024 px; a nerve is 2 to 5 px wide.

    Returns:
        True on nerves, shape (H, W): beside the centreline as far as the nerve stays bright. So width is seen and not
        assumed.

    Raises:
        ValueError: If the image is not 8-bit grey of two dimensions.
    """
    if image.ndim != 2 or image.dtype != np.uint8:
        raise ValueError(f"image has dtype {image.dtype} and shape {image.shape}, expected uint8 of shape (H, W)")
    contrast = _Contrast(image)
    response, orientation = ridges(contrast)
    ridge = apply_hysteresis_threshold(response, WEAK_RESPONSE, STRONG_RESPONSE)
    centreline = without_dust(pruned(ridge, MAX_SPUR_PX), MIN_LENGTH_PX)
    return _widened(centreline, orientation, contrast) if centreline.any() else centreline


class _Contrast:
    """The image minus its background over its local standard deviation, ready to be filtered."""

    def __init__(self, image: NDArray[np.uint8]) -> None:
        grey = image.astype(np.float32)
        detail = grey - _smoothed(grey, BACKGROUND_SIGMA_PX)
        spread = np.sqrt(np.maximum(_smoothed(detail**2, SPREAD_SIGMA_PX), 0))
        height, width = (fft.next_fast_len(size + 2 * _PADDING_PX, real=True) for size in image.shape)
        self.shape, self.padded_shape = image.shape, (height, width)
        margins = [
            (_PADDING_PX, padded - size - _PADDING_PX)
            for padded, size in zip((height, width), image.shape, strict=True)
        ]
        self._spectrum = fft.rfft2(np.pad(detail / np.maximum(spread, MIN_SPREAD_GREY), margins, mode="symmetric"))

    def filtered(self, transfer: Floats) -> Floats:
        """The response to one filter, with its padding."""
        return np.asarray(fft.irfft2(self._spectrum * transfer, self.padded_shape), np.float32)


def ridges(contrast: _Contrast) -> tuple[Floats, NDArray[np.int8]]:
    """Largest response over widths and orientations in units of the local standard deviation, and its orientation."""
    best = np.full(contrast.shape, -np.inf, np.float32)
    orientation = np.zeros(contrast.shape, np.int8)
    for index, angle in enumerate(ANGLES):
        for sigma_px in RIDGE_SIGMAS_PX:
            response = contrast.filtered(_ridge_filters(contrast.padded_shape, sigma_px)[index])
            ahead, behind = (_moved(response, contrast.shape, sign * HALF_REACH_PX, angle) for sign in (1, -1))
            # A bright point has a response all round it, a fibre on both sides: the smaller of two tells them apart.
            on_both_sides = np.minimum(ahead, behind)
            orientation[on_both_sides > best] = index
            np.maximum(best, on_both_sides, out=best)
    return best, orientation


def _widened(centreline: Bools, orientation: NDArray[np.int8], contrast: _Contrast) -> Bools:
    """Pixels near the centreline that are at least EDGE_SHARE as bright as it, averaged along the nerve."""
    distance, nearest = distance_transform_edt(~centreline, return_indices=True)
    near = distance <= MAX_HALF_WIDTH_PX
    nearest = tuple(nearest[:, near])
    brightness, on_centreline = np.zeros(len(nearest[0]), np.float32), np.ones(len(nearest[0]), np.float32)
    for index, transfer in enumerate(_profile_filters(contrast.padded_shape)):
        here = orientation[nearest] == index
        profile = _moved(contrast.filtered(transfer), contrast.shape, 0, 0)
        brightness[here] = profile[near][here]
        on_centreline[here] = profile[nearest][here]
    mask = centreline.copy()
    mask[near] |= brightness >= EDGE_SHARE * np.maximum(on_centreline, 1e-6)
    return mask


def _moved(response: Floats, shape: tuple[int, ...], distance_px: float, angle: float) -> Floats:
    """The response without its padding, seen from a place farther along the ridge."""
    offsets = (distance_px * np.sin(angle), distance_px * np.cos(angle))
    rows, columns = (_PADDING_PX + round(float(offset)) for offset in offsets)
    return response[rows : rows + shape[0], columns : columns + shape[1]]


def _smoothed(values: Floats, sigma_px: float) -> Floats:
    return np.asarray(gaussian_filter(values, sigma_px, truncate=3.0), np.float32)


@lru_cache(maxsize=8)
def _ridge_filters(shape: tuple[int, int], sigma_px: float) -> tuple[Floats, ...]:
    """For each angle, negative curvature across and Gaussian along, zero mean, unit energy; in frequency space."""
    kernels = []
    for along, across in _turned_axes(shape):
        steps = (across / sigma_px) ** 2
        kernel = (1 - steps) * np.exp(-steps / 2) * np.exp(-((along / ALONG_SIGMA_PX) ** 2) / 2)
        kernel -= kernel.mean()
        kernels.append(_transfer_function(kernel / np.sqrt((kernel**2).sum())))
    return tuple(kernels)


@lru_cache(maxsize=4)
def _profile_filters(shape: tuple[int, int]) -> tuple[Floats, ...]:
    """For each angle, an average along the ridge that is narrow across it; in frequency space."""
    kernels = [
        np.exp(-((along / ALONG_SIGMA_PX) ** 2 + (across / PROFILE_SIGMA_PX) ** 2) / 2)
        for along, across in _turned_axes(shape)
    ]
    return tuple(_transfer_function(kernel / kernel.sum()) for kernel in kernels)


def _turned_axes(shape: tuple[int, int]) -> Iterator[tuple[Floats, Floats]]:
    """For each angle, distances (H, W) from the filter's centre, which is the first pixel, along and across it."""
    y, x = np.meshgrid(*(fft.fftfreq(size) * size for size in shape), indexing="ij")
    for angle in ANGLES:
        yield x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _transfer_function(kernel: Floats) -> Floats:
    # The kernel is symmetric about its centre, so its spectrum is real.
    return np.asarray(fft.rfft2(kernel).real, np.float32)
