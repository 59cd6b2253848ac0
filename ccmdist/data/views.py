"""What a sample looks like to a model: at the size of the run, and flipped where that was asked for.

At the wanted size nothing is touched. Else:

* The image is resampled bicubically with a filter that grows with the scale, so that a smaller one has no aliases.
* The mask, shrunk, has a nerve where nerves cover at least half of a pixel or the centre line of one passes through
  it. A thin nerve thus stays connected and does not vanish, and a thick one does not grow. Enlarged, it is copied
  pixel by pixel.
* A hole, shrunk, has every pixel that it has a part in, so none vanishes; enlarged, it is copied likewise.
* A point stays one pixel: the one that its middle lies in. Of points that meet, the higher code is kept.

hflip and vflip mirror a frame: what they make of a right eye is shown as a left one, in the prompt too. rot180 turns
it, as head or microscope may be turned, and keeps the eye. No flip changes the region: the inferior whorl stays one.
A change of any of this raises CONTENT_VERSION in data/cache_index.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.morphology import skeletonize

from ccmdist.config.data import MIRRORS, Flip
from ccmdist.data.triple import Triple, mirrored
from ccmdist.errors import ShardError

Frame = NDArray[np.uint8]
NerveMask = NDArray[np.bool_]
InpaintMask = NDArray[np.bool_]

FLIPS: dict[str, Callable[[NDArray], NDArray]] = {
    "hflip": lambda frame: frame[:, ::-1],
    "vflip": lambda frame: frame[::-1],
    "rot180": lambda frame: frame[::-1, ::-1],
}


def views(triple: Triple, size_px: int, flips: Sequence[Flip], where: str) -> Iterator[Triple]:
    """The sample at ``size_px``, then each flipped view of it under the key ``KEY-FLIP``.

    Args:
        triple: As read from its shard.
        size_px: Edge of the square to which frames are scaled.
        flips: Views to add.
        where: Path of the shard, for messages.

    Raises:
        ShardError: If the frame is not square.
    """
    height, width = triple.image.shape
    if height != width:
        raise ShardError(
            f"{where}: sample {triple.key} is {height}x{width} px, expected a square", "crop it before packing"
        )
    plain = resized(triple, size_px)
    yield plain
    for flip in flips:
        yield replace(flipped(plain, flip), key=f"{triple.key}-{flip}")


def resized(triple: Triple, size_px: int) -> Triple:
    """All pictures of a square sample at another size; its fields, ``um_per_px`` among them, stay."""
    return replace(
        triple,
        image=resized_image(triple.image, size_px),
        nerve_mask=resized_mask(triple.nerve_mask, size_px),
        inpaint_mask=None if triple.inpaint_mask is None else resized_hole(triple.inpaint_mask, size_px),
        points=None if triple.points is None else resized_points(triple.points, size_px),
    )


def flipped(triple: Triple, flip: str) -> Triple:
    """All pictures of a sample flipped alike, under the same key; of the other eye where that mirrors them."""

    def turned(frame: NDArray) -> NDArray:
        return np.ascontiguousarray(FLIPS[flip](frame))

    return replace(
        triple,
        meta=mirrored(triple.meta) if flip in MIRRORS else triple.meta,
        image=turned(triple.image),
        nerve_mask=turned(triple.nerve_mask),
        inpaint_mask=None if triple.inpaint_mask is None else turned(triple.inpaint_mask),
        points=None if triple.points is None else turned(triple.points),
    )


def resized_image(image: Frame, size_px: int) -> Frame:
    """A square grey frame, uint8, at another size."""
    if image.shape[0] == size_px:
        return image
    return np.asarray(Image.fromarray(image).resize((size_px, size_px), Image.Resampling.BICUBIC))


def resized_mask(nerve_mask: NerveMask, size_px: int) -> NerveMask:
    """A square mask at another size, every nerve of it as connected as it was."""
    edge_px = nerve_mask.shape[0]
    if edge_px == size_px:
        return nerve_mask
    if edge_px < size_px:
        return _enlarged(nerve_mask, size_px)
    cover = Image.fromarray(nerve_mask.astype(np.float32)).resize((size_px, size_px), Image.Resampling.BOX)
    resized = np.asarray(cover) >= 0.5
    rows, columns = np.nonzero(skeletonize(nerve_mask))
    resized[rows * size_px // edge_px, columns * size_px // edge_px] = True
    return resized


def resized_hole(inpaint_mask: InpaintMask, size_px: int) -> InpaintMask:
    """A square hole at another size, no part of it lost."""
    edge_px = inpaint_mask.shape[0]
    if edge_px == size_px:
        return inpaint_mask
    if edge_px < size_px:
        return _enlarged(inpaint_mask, size_px)
    resized = np.zeros((size_px, size_px), bool)
    rows, columns = np.nonzero(inpaint_mask)
    # Shrunk, a pixel has a part in one or two along each edge: those of its first and of its last point.
    for down in (rows * size_px // edge_px, ((rows + 1) * size_px - 1) // edge_px):
        for right in (columns * size_px // edge_px, ((columns + 1) * size_px - 1) // edge_px):
            resized[down, right] = True
    return resized


def resized_points(points: Frame, size_px: int) -> Frame:
    """A square map of points at another size."""
    edge_px = points.shape[0]
    if edge_px == size_px:
        return points
    resized = np.zeros((size_px, size_px), np.uint8)
    rows, columns = np.nonzero(points)
    at = tuple((2 * places + 1) * size_px // (2 * edge_px) for places in (rows, columns))
    np.maximum.at(resized, at, points[rows, columns])
    return resized


def _enlarged(mask: NDArray[np.bool_], size_px: int) -> NDArray[np.bool_]:
    source = np.arange(size_px) * mask.shape[0] // size_px
    return mask[np.ix_(source, source)]
