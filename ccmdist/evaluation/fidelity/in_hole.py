"""How near what fills a hole is to the real frame: inside the hole alone, beside simple ways to fill it.

Both images are compared as the real frame with one hole filled: what an image holds outside of its hole cannot change
a figure.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, gaussian_laplace

from ccmdist.ccm.skeleton import Bools, Floats
from ccmdist.commit import digest_of
from ccmdist.data.triple import Triple
from ccmdist.evaluation.fidelity.appearance import LOG_SIGMAS_PX
from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS, filled
from ccmdist.evaluation.fidelity.paired import WINDOW_SIGMA_PX, psnr_db

FILTER_DISTANCE: Final = "filter_distance"
IN_HOLE: Final[dict[str, str]] = {"ssim": "SSIM", "psnr_db": "PSNR, dB", FILTER_DISTANCE: "filter distance"}
"""The measures of :func:`in_hole` and how tables name them; of the last one, less is better."""
FILTERS: Final = "log-on-off-v1"
"""A bank of fixed filters. LPIPS needs the weights of a network and of people's judgements; this has neither."""
RESPONSE_FLOOR: Final = 1.0
"""Grey levels. Weaker responses count less than their direction says: a flat patch resembles nothing."""
FILTERS_SHA256: Final = digest_of([FILTERS, LOG_SIGMAS_PX, RESPONSE_FLOOR])
REACH_PX: Final = 2 * int(4 * max(LOG_SIGMAS_PX) + 0.5)
"""How far a pixel is seen: by the widest filter and the pooling after it, both cut off at four sigmas as scipy does."""
SHARE: Final = "hole_share"
"""Column: the part of the image that was filled; a whole image has none."""
IS_OWN: Final = "hole_is_own"
"""Column: 1 where the real frame itself has a hole, else 0."""

Image = NDArray[np.uint8]


def column(fill: str, measure: str) -> str:
    """Name of the column that holds a measure of IN_HOLE of a way of FILLS to fill the hole."""
    return f"hole_{fill}_{measure}"


def measured_in_hole(triple: Triple, source: Triple | None, other: Triple | None) -> dict[str, float]:
    """All measures of a synthetic image whose hole was filled, and of simple fills, by column.

    Args:
        triple: The image, with its inpaint mask.
        source: The real frame of which it is a repair; None if that is not at hand.
        other: A real frame of another subject; None if there is none.

    Returns:
        Measures are NaN where there is nothing to compare with: no frame, or one that has a hole of its own there, of
        which nobody knows what it hides; and for the fills that there are not.
    """
    hole = triple.inpaint_mask
    assert hole is not None, "a hole was filled"
    is_own = source is not None and source.inpaint_mask is not None
    columns = {SHARE: float(hole.mean()), IS_OWN: float(is_own)}
    columns |= {column(fill, measure): float("nan") for fill in FILLS for measure in IN_HOLE}
    if source is not None and not is_own:
        fills = {DRAWN: triple.image, **filled(source.image, hole, other.image if other else None)}
        for fill, found in in_hole(source.image, hole, fills).items():
            columns |= {column(fill, measure): value for measure, value in found.items()}
    return columns


def in_hole(frame: Image, hole: Bools, fills: dict[str, Image]) -> dict[str, dict[str, float]]:
    """The measures of IN_HOLE for each of several ways to fill a hole.

    Args:
        frame: The real one, 8-bit grey, (H, W).
        hole: (H, W), at least one pixel.
        fills: Images of the same shape, of which only the hole is looked at.

    Returns:
        SSIM: mean over the hole of the local similarity. PSNR: of the squared error in the hole. Filter distance: see
        :func:`on_off`; the mean over the hole of the squared distance of two unit vectors, 0 to 2.
    """
    rows, columns = (slice(*_reach(np.asarray(hole.any(axis=axis)))) for axis in (1, 0))
    real, inside = frame[rows, columns], hole[rows, columns]
    seen = on_off(real)[inside]
    measures = {}
    for name, fill in fills.items():
        image = np.where(inside, fill[rows, columns], real)
        measures[name] = {
            "ssim": float(_ssim_map(real, image)[inside].mean()),
            "psnr_db": psnr_db(real[inside], image[inside]),
            FILTER_DISTANCE: float(((on_off(image)[inside] - seen) ** 2).sum(axis=-1).mean()),
        }
    return measures


def on_off(image: Image) -> Floats:
    """What fixed filters see at each pixel, as a vector of at most unit length, (H, W, 2 x sigmas).

    A Laplacian of Gaussian at each of LOG_SIGMAS_PX, parted into what is brighter and what is darker than its
    surroundings and pooled over a Gaussian as wide: grain is compared by its strength, and nerves by their place.
    LPIPS is built alike, of rectified responses that are scaled to unit length at each pixel, but of a trained network
    and with weights fitted to people: no figure of one compares with the other.

    Source:
        Zhang et al., CVPR 2018 (arXiv:1801.03924), Eq. 1 with all channel weights 1, on filters in place of a network.
    """
    grey = image.astype(np.float64)
    parts = []
    for sigma_px in LOG_SIGMAS_PX:
        # A kernel that is cut off answers to a flat image too; that is taken away.
        flat = gaussian_laplace(np.ones((1, 1)), sigma_px)[0, 0]
        response = (flat * grey - gaussian_laplace(grey, sigma_px, mode="reflect")) * sigma_px**2
        parts += [gaussian_filter(np.maximum(one, 0), sigma_px, mode="reflect") for one in (response, -response)]
    seen = np.stack(parts, axis=-1)
    return np.asarray(seen / np.sqrt((seen**2).sum(axis=-1, keepdims=True) + RESPONSE_FLOOR**2))


def _ssim_map(first: Image, second: Image) -> Floats:
    from skimage.metrics import structural_similarity

    _, similarity = structural_similarity(
        *(first, second),
        data_range=255,
        gaussian_weights=True,
        sigma=WINDOW_SIGMA_PX,
        use_sample_covariance=False,
        full=True,
    )
    return np.asarray(similarity)


def _reach(is_in_line: Bools) -> tuple[int, int]:
    """The lines that any filter sees from within the hole; what lies beyond them changes nothing, and takes time."""
    lines = np.flatnonzero(is_in_line)
    return max(int(lines[0]) - REACH_PX, 0), int(lines[-1]) + 1 + REACH_PX
