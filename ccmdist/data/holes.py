"""Holes in images, for a model to fill: how they look, whose they are, and how they lie in a cache.

Every size is a fraction of the frame's edge, so a hole is the same at every size of the run, and none is empty:

* rectangle: edges of 0.2 to 0.5, anywhere within the frame.
* stroke: freehand, 0.6 to 1.4 long and 0.06 to 0.14 wide.
* band: crosses the frame, slightly bent, 0.06 to 0.16 wide; so do pressure lines and K-structures hide nerves.
* quadrant: one of the four quarters.
* everything: the whole frame; filling it is drawing a frame from what stands for its nerves alone.

What a hole hides is grey in the image. The paper's ratios and shapes were not to be found: these are ours. A change
of any of this raises CONTENT_VERSION in data/cache_index.py.

Shape suffixes: H W pixels; K holes of a sample; S = (H/16)(W/16) tokens, row by row as flow.pack_latents orders them.
"""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
import torch
from numpy.random import Generator, default_rng
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from ccmdist.config.data import PX_PER_TOKEN, HoleSettings, HoleShape
from ccmdist.data.triple import Triple
from ccmdist.data.views import resized_hole

HOLE_GREY: Final = 128
"""Of pixels in a hole: the middle of the range, 0 to the VAE."""
RECTANGLE_EDGES: Final = (0.2, 0.5)
STROKE_LENGTHS: Final = (0.6, 1.4)
STROKE_WIDTHS: Final = (0.06, 0.14)
STROKE_STEPS: Final = 48
"""After each of them a stroke turns a little: by a third of a radian, one standard deviation."""
BAND_WIDTHS: Final = (0.06, 0.16)
MAX_BAND_OFFSET: Final = 0.25
"""From the middle of the frame to the middle of a band."""
MAX_BAND_BEND: Final = 0.08
"""By how much a band has left its straight line half an edge from its middle."""

Bools = NDArray[np.bool_]


def holes_of(triple: Triple, settings: HoleSettings, size_px: int) -> Bools:
    """The holes of a sample, (K, H, W) of H = W = ``size_px``; a pure function of (settings, key, variant).

    Variant k does not depend on how many there are. A sample with an inpaint mask of its own has that one K times.
    """
    if triple.inpaint_mask is not None:
        return np.repeat(resized_hole(triple.inpaint_mask, size_px)[None], settings.per_sample, axis=0)
    found = []
    for variant in range(settings.per_sample):
        drawn = hashlib.sha256(f"{settings.seed}/{triple.key}/{variant}".encode()).digest()
        rng = default_rng(int.from_bytes(drawn[:8]))
        found.append(hole(settings.shapes[rng.integers(len(settings.shapes))], size_px, rng))
    return np.stack(found)


def hole(shape_name: HoleShape, size_px: int, rng: Generator) -> Bools:
    """A hole (H, W) of H = W = ``size_px``, True where the image is to be filled; at least one pixel is."""
    drawn = SHAPES[shape_name](size_px, rng)
    assert drawn.any(), f"an empty {shape_name}"
    return drawn


def holed_image(image: NDArray[np.uint8], hole: Bools) -> NDArray[np.uint8]:
    """The image (..., H, W) without what the hole (..., H, W) hides."""
    return np.where(hole, np.uint8(HOLE_GREY), image)


def packed(holes: Bools) -> NDArray[np.uint8]:
    """Holes (..., H, W) as a cache holds them, eight columns in a byte: (..., H, ceil(W/8))."""
    return np.packbits(holes, axis=-1)


def unpacked(holes: Tensor, width: int) -> Tensor:
    """The inverse of :func:`packed`: uint8 (..., H, ceil(width/8)) to bool (..., H, width)."""
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=holes.device)
    return ((holes.unsqueeze(-1) >> places) & 1).bool().flatten(-2)[..., :width]


def hole_tokens(hole_HW: Tensor) -> Tensor:
    """Which tokens a hole has a part in: bool (..., H, W) to bool (..., S)."""
    return _by_token(hole_HW).any(dim=-1).any(dim=-2).flatten(-2)


def layout_of(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How much of each token a structure picture covers: (H, W) or (H, W, 3) to (H/16, W/16), 0 none ... 255 all."""
    covered = torch.from_numpy(picture.reshape(*picture.shape[:2], -1).any(axis=-1))
    share = _by_token(covered).float().mean(dim=(-3, -1))
    return (share * 255).round().to(torch.uint8).numpy()


def _by_token(frames: Tensor) -> Tensor:
    """(..., H, W) to (..., H/16, 16, W/16, 16)."""
    return frames.unflatten(-1, (-1, PX_PER_TOKEN)).unflatten(-3, (-1, PX_PER_TOKEN))


def _rectangle(size_px: int, rng: Generator) -> Bools:
    edges_px = np.maximum(np.rint(rng.uniform(*RECTANGLE_EDGES, 2) * size_px).astype(int), 1)
    top, left = np.rint(rng.random(2) * (size_px - edges_px)).astype(int)
    drawn = np.zeros((size_px, size_px), bool)
    drawn[top : top + edges_px[0], left : left + edges_px[1]] = True
    return drawn


def _stroke(size_px: int, rng: Generator) -> Bools:
    length, width = rng.uniform(*STROKE_LENGTHS), rng.uniform(*STROKE_WIDTHS)
    start = rng.uniform(0.15, 0.85, 2)
    heading = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 1 / 3, STROKE_STEPS))
    path = start + length / STROKE_STEPS * np.cumsum(np.stack([np.sin(heading), np.cos(heading)], axis=1), axis=0)
    # Finer than the pixels, so that it has no gaps; what would leave the frame comes back into it.
    at = np.linspace(0, STROKE_STEPS - 1, 3 * size_px)
    fine = np.stack([np.interp(at, np.arange(STROKE_STEPS), path[:, axis]) for axis in (0, 1)])
    rows, columns = ((1 - np.abs(1 - fine % 2)) * (size_px - 1)).round().astype(int)
    beside = np.ones((size_px, size_px), bool)
    beside[rows, columns] = False
    drawn: Bools = distance_transform_edt(beside) <= width * size_px / 2
    return drawn


def _band(size_px: int, rng: Generator) -> Bools:
    angle, width = rng.uniform(0, np.pi), rng.uniform(*BAND_WIDTHS)
    offset, bend = rng.uniform(-MAX_BAND_OFFSET, MAX_BAND_OFFSET), rng.uniform(-MAX_BAND_BEND, MAX_BAND_BEND)
    at = (np.arange(size_px) + 0.5) / size_px - 0.5
    along = at[:, None] * np.sin(angle) + at * np.cos(angle)
    across = at[:, None] * np.cos(angle) - at * np.sin(angle)
    # At least one pixel wide, and its middle lies within the frame: some pixel's middle is in it.
    half = max(width / 2, 0.75 / size_px)
    drawn: Bools = np.abs(across - offset - bend * (2 * along) ** 2) <= half
    return drawn


def _quadrant(size_px: int, rng: Generator) -> Bools:
    down, right = rng.integers(2, size=2)
    half = size_px // 2
    drawn = np.zeros((size_px, size_px), bool)
    drawn[half * down : half * (1 + down), half * right : half * (1 + right)] = True
    return drawn


def _everything(size_px: int, rng: Generator) -> Bools:
    return np.ones((size_px, size_px), bool)


SHAPES: Final[Mapping[HoleShape, Callable[[int, Generator], Bools]]] = MappingProxyType(
    {"rectangle": _rectangle, "stroke": _stroke, "band": _band, "quadrant": _quadrant, "everything": _everything}
)
