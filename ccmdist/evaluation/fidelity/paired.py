"""How near an image is to the real frame of the same mask; and how near a blurred frame is to itself, as a caution."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from ccmdist.ccm.skeleton import Floats

PAIRED: Final[dict[str, str]] = {"ssim": "SSIM", "ms_ssim": "MS-SSIM", "psnr_db": "PSNR, dB"}
"""The measures of :func:`similarity` and how tables name them."""
SCALE_WEIGHTS: Final = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_SIGMA_PX: Final = 1.5
WINDOW_PX: Final = 11
BLUR_SIGMA_PX: Final = 1.0


def similarity(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> dict[str, float]:
    """All measures of PAIRED; MS-SSIM is NaN for images that are too small for two scales."""
    return {"ssim": ssim(first, second), "ms_ssim": ms_ssim(first, second), "psnr_db": psnr_db(first, second)}


def without_similarity() -> dict[str, float]:
    """The same for an image that has no counterpart."""
    return dict.fromkeys(PAIRED, float("nan"))


def blurred(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image without its finest detail (Gaussian of 1 px): by SSIM and PSNR an excellent forgery of itself."""
    return np.asarray(gaussian_filter(image.astype(np.float64), BLUR_SIGMA_PX).round().astype(np.uint8))


def ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Structural similarity with Gaussian weights of 1.5 px, as Wang et al. 2004 define it, for 8-bit grey."""
    from skimage.metrics import structural_similarity

    value = structural_similarity(
        first, second, data_range=255, gaussian_weights=True, sigma=WINDOW_SIGMA_PX, use_sample_covariance=False
    )
    return float(value)


def psnr_db(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB for 8-bit grey; 100 for equal images, so that a mean stays finite."""
    error = float(((first.astype(float) - second.astype(float)) ** 2).mean())
    return min(10 * np.log10(255**2 / error), 100.0) if error else 100.0


def num_scales(shape: tuple[int, int]) -> int:
    """Scales of MS-SSIM at which the window still fits into the image; each halves it, and there are five at most."""
    fitting = [scale for scale in range(len(SCALE_WEIGHTS)) if min(shape) // 2**scale >= WINDOW_PX]
    return len(fitting)


def ms_ssim(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Multi-scale structural similarity for 8-bit grey; NaN if the images are too small for two scales.

    Below 176 px the coarsest scales do not fit: the weights of the others are then scaled to sum to 1, and the value
    compares with those at the same number of scales only.

    Source:
        Wang, Simoncelli and Bovik 2003, Eq. 7; negative means of a scale count as 0.
    """
    scales = num_scales((first.shape[0], first.shape[1]))
    if scales < 2:
        return float("nan")
    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    pair, value = (first.astype(np.float64), second.astype(np.float64)), 1.0
    for scale, weight in enumerate(weights):
        whole, structure = _means(*pair)
        value *= max(whole if scale == scales - 1 else structure, 0.0) ** weight
        pair = (_halved(pair[0]), _halved(pair[1]))
    return float(value)


def _means(first: Floats, second: Floats) -> tuple[float, float]:
    """Mean SSIM, and mean of its part without luminance, where the window lies inside the image."""
    mean_first, mean_second = _windowed(first), _windowed(second)
    variances = _windowed(first**2) - mean_first**2 + _windowed(second**2) - mean_second**2
    covariance = _windowed(first * second) - mean_first * mean_second
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * covariance + c2) / (variances + c2)
    luminance = (2 * mean_first * mean_second + c1) / (mean_first**2 + mean_second**2 + c1)
    return float((luminance * structure).mean()), float(structure.mean())


def _windowed(values: Floats) -> Floats:
    edge = WINDOW_PX // 2
    smooth = gaussian_filter(values, WINDOW_SIGMA_PX, radius=edge)
    return np.asarray(smooth[edge:-edge, edge:-edge])


def _halved(values: Floats) -> Floats:
    height, width = (size // 2 * 2 for size in values.shape)
    return np.asarray(values[:height, :width].reshape(height // 2, 2, width // 2, 2).mean(axis=(1, 3)))
