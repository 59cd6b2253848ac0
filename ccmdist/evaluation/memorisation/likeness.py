"""How alike two frames are when brightness, a flip, a small turn and a small shift do not count.

Two looks. The coarse one compares every frame with every other through unit vectors, and finds candidates. The close
one lays two frames over each other as exactly as it can and takes the normalised cross-correlation (NCC) of what they
share. Both see a frame at one working size, freed from slow shading and from grain, with its contrast levelled: what
is left is where nerves, cells and texture lie. No network and no weights are in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage
from scipy.ndimage import affine_transform, gaussian_filter, uniform_filter

from ccmdist.data.views import FLIPS

Detail = NDArray[np.float32]
"""(W, W) at the working size."""

LIKENESS_VERSION: Final = "registered-ncc-v1"
"""Raised whenever the same two frames would get another likeness; older files are then searched anew."""
WORK_PX: Final = 128
"""Edge at which frames are compared; smaller frames keep their size."""
COARSE_PX: Final = 24
BAND_SIGMAS_PX: Final = (1.5, 6.0)
"""At the working size: finer detail is grain, which a copy may have lost; coarser is shading, which all share."""
LEVEL_PX: Final = 33
MAX_SHIFT: Final = 0.125
"""Of the edge."""
COARSE_TURNS_DEG: Final = (-5.0, 0.0, 5.0)
COARSE_REACH_PX: Final = 2
CLOSE_TURNS_DEG: Final = (-2.5, 0.0, 2.5)
FINE_TURNS_DEG: Final = (-1.25, -0.6, 0.6, 1.25)
NUM_CANDIDATES: Final = 4
FLIP_NAMES: Final = ("none", *FLIPS)


@dataclass(frozen=True)
class Match:
    """The frame that another one comes nearest to, and how it has to be moved to lie over it."""

    index: int
    """Of the nearest frame."""
    ncc: float
    """Of what the two share, in [-1, 1]; 1 is a copy."""
    flip: str
    """Of FLIP_NAMES, done first."""
    turn_deg: float
    """Counter-clockwise, about the centre; done second."""
    shift: tuple[float, float]
    """Down and right, as a fraction of the edge; done last."""


@dataclass(frozen=True, eq=False)
class Looked:
    """A frame as both looks see it."""

    detail: Detail

    @cached_property
    def coarse(self) -> NDArray[np.float32]:
        """Unit vector of COARSE_PX squared numbers."""
        return _unit(_coarse(self.detail).reshape(1, -1))[0]

    @cached_property
    def spectrum(self) -> NDArray[np.complex64]:
        """Of the windowed detail, (W, W / 2 + 1)."""
        return _spectrum(self.detail)


def looked(image: NDArray[np.uint8], blank: NDArray[np.bool_] | None = None) -> Looked:
    """A frame freed from shading, grain and contrast.

    Args:
        image: 8-bit grey, (H, W).
        blank: Pixels that are not to count, such as nerves: what lies around them is put in their place.
    """
    grey = image.astype(np.float32)
    if blank is not None and blank.any():
        grey = _filled(grey, blank)
    work_px = min(WORK_PX, *grey.shape)
    fine, broad = BAND_SIGMAS_PX
    grey = _resized(grey, work_px)
    band = gaussian_filter(grey, fine) - gaussian_filter(grey, broad)
    # The filter's running sum may fall a little below 0 where a frame is flat, such as in a hole.
    spread = np.sqrt(np.maximum(uniform_filter(band * band, LEVEL_PX, mode="reflect"), 0))
    return Looked(np.asarray(band / (spread + 0.5), np.float32))


def variants(one: Looked) -> NDArray[np.float32]:
    """The coarse vectors of a frame under every flip, turn and shift, (variants, COARSE_PX squared).

    They stand in the order of :data:`VARIANTS`.
    """
    small = _coarse(one.detail)
    moved = np.stack([_turned(_flipped(small, flip), turn) for flip in FLIP_NAMES for turn in COARSE_TURNS_DEG])
    reach = COARSE_REACH_PX
    padded = np.pad(moved, ((0, 0), (reach, reach), (reach, reach)))
    shifted = np.lib.stride_tricks.sliding_window_view(padded, small.shape, (1, 2))
    return _unit(shifted.reshape(len(VARIANTS), -1))


VARIANTS: Final = [
    (flip, turn)
    for flip in FLIP_NAMES
    for turn in COARSE_TURNS_DEG
    for _ in range((2 * COARSE_REACH_PX + 1) ** 2)  # shifts, each pixel of either axis
]


def coarse_likeness(one: Looked, gallery: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Cosine of the best variant of a frame with each vector of a gallery, and which variant that is.

    Args:
        one: The frame.
        gallery: Coarse vectors, (frames, COARSE_PX squared).

    Returns:
        Two arrays of shape (frames,): the likeness, and an index into VARIANTS.
    """
    likeness = variants(one) @ gallery.T
    best = likeness.argmax(axis=0)
    return likeness[best, np.arange(len(gallery))], best


def shifted_likeness(one: Looked, gallery: NDArray[np.float32]) -> NDArray[np.float32]:
    """As :func:`coarse_likeness`, of shifts alone: (frames,)."""
    unmoved = [flip == "none" and turn == 0 for flip, turn in VARIANTS]
    return np.asarray((variants(one)[unmoved] @ gallery.T).max(axis=0))


def nearest(one: Looked, gallery: Sequence[Looked], likeness: NDArray[np.float32], variant: NDArray[np.intp]) -> Match:
    """The frame of a gallery that a frame lies over best.

    Args:
        one: The frame.
        gallery: What it is compared with; at least one frame.
        likeness: Of :func:`coarse_likeness` with the gallery.
        variant: Likewise.
    """
    candidates = [int(index) for index in np.argsort(-likeness, kind="stable")[:NUM_CANDIDATES]]
    found = [
        aligned(one, gallery[index], index, flip, turn + by)
        for index in candidates
        for flip, turn in [VARIANTS[variant[index]]]
        for by in CLOSE_TURNS_DEG
    ]
    best = max(found, key=lambda match: match.ncc)
    finer = [aligned(one, gallery[best.index], best.index, best.flip, best.turn_deg + by) for by in FINE_TURNS_DEG]
    return max([best, *finer], key=lambda match: match.ncc)


def aligned(one: Looked, other: Looked, index: int, flip: str, turn_deg: float) -> Match:
    """How a frame lies over another one, number ``index``, at the best shift for one flip and turn.

    Args:
        one: The frame that is moved.
        other: The frame that stays.
        index: Told in the result.
        flip: Of FLIP_NAMES.
        turn_deg: After the flip.
    """
    turned = _turned(_flipped(one.detail, flip), turn_deg)
    correlation = fft.irfft2(other.spectrum * np.conj(_spectrum(turned)), turned.shape)
    reach = int(MAX_SHIFT * len(turned))
    near = np.roll(correlation, (reach, reach), (0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    down, right = (int(at) - reach for at in np.unravel_index(int(near.argmax()), near.shape))
    ncc = overlap_ncc(turned, other.detail, down, right)
    return Match(index, ncc, flip, turn_deg, (down / len(turned), right / len(turned)))


def moved(image: NDArray[np.uint8], flip: str, turn_deg: float, shift: tuple[float, float]) -> NDArray[np.uint8]:
    """A frame of any size, laid over another one as a :class:`Match` says; black where it shows nothing.

    Args:
        image: 8-bit grey, (H, W).
        flip: As in the match, like all that follows.
        turn_deg: Likewise.
        shift: Likewise, as fractions of the edge.
    """
    turned = _turned(_flipped(image.astype(np.float32), flip), turn_deg)
    by = [fraction * edge for fraction, edge in zip(shift, image.shape, strict=True)]
    return np.clip(ndimage.shift(turned, by, order=1), 0, 255).round().astype(np.uint8)


def overlap_ncc(detail: Detail, other: Detail, down: int, right: int) -> float:
    """Pearson correlation of two frames over what they share when the first one is shifted; 0 without any contrast."""
    first, second = _common(detail, -down, -right), _common(other, down, right)
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((first * first).sum(dtype=np.float64) * (second * second).sum(dtype=np.float64)))
    return float((first * second).sum(dtype=np.float64)) / scale if scale > 0 else 0.0


def _common(frame: Detail, down: int, right: int) -> Detail:
    height, width = frame.shape
    return frame[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]


def _filled(grey: Detail, blank: NDArray[np.bool_]) -> Detail:
    weight = gaussian_filter((~blank).astype(np.float32), 6) + 1e-3
    around = gaussian_filter(np.where(blank, 0, grey), 6) / weight
    return np.where(blank, around, grey)


def _resized(grey: Detail, size_px: int) -> Detail:
    if grey.shape == (size_px, size_px):
        return grey
    return np.asarray(Image.fromarray(grey).resize((size_px, size_px), Image.Resampling.BOX))


def _coarse(detail: Detail) -> Detail:
    return _resized(gaussian_filter(detail, 2.0), COARSE_PX)


def _flipped(frame: Detail, flip: str) -> Detail:
    return frame if flip == "none" else np.ascontiguousarray(FLIPS[flip](frame))


def _turned(frame: Detail, turn_deg: float) -> Detail:
    if turn_deg == 0:
        return frame
    cosine, sine = np.cos(np.deg2rad(turn_deg)), np.sin(np.deg2rad(turn_deg))
    matrix = np.array([[cosine, sine], [-sine, cosine]])
    middle = (np.array(frame.shape) - 1) / 2
    return affine_transform(frame, matrix, middle - matrix @ middle, order=1, mode="constant")


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _spectrum(detail: Detail) -> NDArray[np.complex64]:
    # Without a window the borders, which a shift tears apart, would correlate.
    window = np.sqrt(np.hanning(len(detail) + 2)[1:-1]).astype(np.float32)
    return np.asarray(fft.rfft2(detail * window[:, None] * window))
