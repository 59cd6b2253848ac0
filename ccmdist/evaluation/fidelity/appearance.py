"""What a mask does not fix: grey levels, contrast, grain and spectrum; and a feature extractor that has no weights."""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.ndimage import binary_dilation, gaussian_filter, gaussian_laplace
from scipy.stats import skew

from ccmdist.ccm.skeleton import Bools, Floats
from ccmdist.commit import digest_of

APPEARANCE: Final[dict[str, str]] = {
    "grey_median": "median grey",
    "grey_sd": "SD of grey",
    "nerve_contrast": "nerve contrast",
    "grain": "grain (SD / mean)",
    "grain_acf_x_1": "grain autocorrelation at 1 px, x",
    "grain_acf_y_1": "grain autocorrelation at 1 px, y",
    "slope_low": "spectrum slope, 0.02-0.1 cycles/px",
    "slope_high": "spectrum slope, 0.1-0.4 cycles/px",
}
"""The statistics of :func:`appearance` that tables show, and how they name them."""

NERVE_MARGIN_PX: Final = 3
GRAIN_SIGMA_PX: Final = 2.0
SPECTRUM_EDGES: Final = tuple(float(edge) for edge in np.geomspace(0.014, 0.5, 18))
"""Borders of the spectrum's bins in cycles per px."""
SPECTRUM_COLUMNS: Final = tuple(f"spectrum_{index:02d}" for index in range(len(SPECTRUM_EDGES) - 1))
GRAIN_LAGS_PX: Final = (1, 2, 3, 4, 5, 6)
GRAIN_COLUMNS: Final = tuple(f"grain_acf_{axis}_{lag}" for axis in "xy" for lag in GRAIN_LAGS_PX)
LOW_BAND: Final = (0.02, 0.1)
HIGH_BAND: Final = (0.1, 0.4)

EXTRACTOR: Final = "weight-free-logbank-v1"
"""A bank of Laplacian-of-Gaussian filters. No network, no weights: a distance over it is no FID and never so called."""
LOG_SIGMAS_PX: Final = (1.0, 1.5, 2.5, 4.0, 6.5)
EXTRACTOR_SHA256: Final = digest_of([EXTRACTOR, LOG_SIGMAS_PX, "log10 sd, skewness; median, log10 sd of grey"])
NUM_FEATURES: Final = 2 * len(LOG_SIGMAS_PX) + 2


def appearance(image: NDArray[np.uint8], nerve_mask: Bools) -> dict[str, float]:
    """The statistics of one image.

    Args:
        image: 8-bit grey, shape (H, W).
        nerve_mask: Where the segmenter saw nerves in it, same shape.

    Returns:
        By the names of :data:`APPEARANCE`, :data:`GRAIN_COLUMNS` and :data:`SPECTRUM_COLUMNS`. Contrast is how much
        brighter nerves are than the tissue 4 to 8 px beside them, as a fraction of the latter. Grain is what a Gaussian
        of 2 px removes, away from nerves, over the local mean; its autocorrelation, at GRAIN_LAGS_PX along x and then
        along y, tells speckle from pixel noise. Slopes are of the log power over the log frequency.
    """
    grey = image.astype(np.float64)
    grain, autocorrelation = _grain(grey, ~binary_dilation(nerve_mask, iterations=NERVE_MARGIN_PX))
    power = spectrum(image)
    return {
        "grey_median": float(np.median(grey)),
        "grey_sd": float(grey.std()),
        "nerve_contrast": _contrast(grey, nerve_mask),
        "grain": grain,
        "slope_low": _slope(power, LOW_BAND),
        "slope_high": _slope(power, HIGH_BAND),
        **dict(zip(GRAIN_COLUMNS, autocorrelation, strict=True)),
        **dict(zip(SPECTRUM_COLUMNS, power.tolist(), strict=True)),
    }


def _contrast(grey: Floats, nerve_mask: Bools) -> float:
    near = binary_dilation(nerve_mask, iterations=8) & ~binary_dilation(nerve_mask, iterations=NERVE_MARGIN_PX)
    if not nerve_mask.any() or not near.any():
        return float("nan")
    return float(grey[nerve_mask].mean() / max(grey[near].mean(), 1.0) - 1)


def _grain(grey: Floats, tissue: Bools) -> tuple[float, list[float]]:
    """Relative SD of the fine detail on tissue, and its autocorrelation by GRAIN_COLUMNS."""
    smooth = gaussian_filter(grey, GRAIN_SIGMA_PX)
    detail = (grey - smooth) / np.maximum(smooth, 1.0)
    # Rows of the transposed frame are columns: the lag is along x, then along y.
    along = ((detail, tissue), (detail.T, tissue.T))
    correlations = [
        _correlation(values[:, :-lag], values[:, lag:], where[:, :-lag] & where[:, lag:])
        for values, where in along
        for lag in GRAIN_LAGS_PX
    ]
    return float(detail[tissue].std()) if tissue.any() else float("nan"), correlations


def _correlation(first: Floats, second: Floats, where: Bools) -> float:
    spread = first[where].std() * second[where].std() if where.sum() > 2 else 0.0
    if spread < 1e-12:
        return float("nan")
    return float(((first[where] - first[where].mean()) * (second[where] - second[where].mean())).mean() / spread)


def spectrum(image: NDArray[np.uint8]) -> Floats:
    """log10 of the mean power in each bin of :data:`SPECTRUM_EDGES`; NaN where the image has no frequency in a bin."""
    height, width = image.shape
    grey = image.astype(np.float64) / 255
    window = np.outer(np.hanning(height), np.hanning(width))
    power = np.abs(fft.rfft2((grey - grey.mean()) * window)) ** 2 / (window**2).sum()
    frequency = np.hypot(fft.fftfreq(height)[:, None], fft.rfftfreq(width))
    bins = np.digitize(frequency.ravel(), SPECTRUM_EDGES)
    counts = np.bincount(bins, minlength=len(SPECTRUM_EDGES) + 1)[1:-1]
    sums = np.bincount(bins, power.ravel(), minlength=len(SPECTRUM_EDGES) + 1)[1:-1]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log10(np.maximum(sums / counts, 1e-12)))


def _slope(power: Floats, band: tuple[float, float]) -> float:
    middle = np.log10(np.sqrt(np.array(SPECTRUM_EDGES[:-1]) * np.array(SPECTRUM_EDGES[1:])))
    inside = (middle >= np.log10(band[0])) & (middle <= np.log10(band[1])) & np.isfinite(power)
    return float(np.polyfit(middle[inside], power[inside], 1)[0]) if inside.sum() >= 2 else float("nan")


def features(image: NDArray[np.uint8]) -> Floats:
    """What :data:`EXTRACTOR` sees in an image, NUM_FEATURES numbers.

    Spread (log10) and skewness of the response to a Laplacian of Gaussian at each of LOG_SIGMAS_PX, then median and
    spread (log10) of the grey levels, which run from 0 to 1.
    """
    grey = image.astype(np.float64) / 255
    responses = [gaussian_laplace(grey, sigma_px, mode="reflect") * sigma_px**2 for sigma_px in LOG_SIGMAS_PX]
    spreads = [np.log10(response.std() + 1e-4) for response in responses]
    skews = [float(skew(response, axis=None)) if response.std() > 1e-9 else 0.0 for response in responses]
    return np.array([*spreads, *skews, np.median(grey), np.log10(grey.std() + 1e-4)])
