"""What a sample looks like to a model: at the size of the run, and flipped where that was asked for.

At the wanted size nothing is touched. Else:

* The image is resampled bicubically with a filter that grows with the scale, so that a smaller one has no aliases.
* The mask, shrunk, has a nerve where nerves cover at least half of a pixel or the centre line of one passes through
  it. A thin nerve thus stays connected and does not vanish, and a thick one does not grow. Enlarged, it is copied
  pixel by pixel.

A flipped view keeps its prompt. Mind that hflip and vflip turn a right eye's whorl into a left eye's; rot180 does not.
A change of any of this raises CONTENT_VERSION in data/cache_index.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from skimage.morphology import skeletonize

from ccmdist.config.data import Flip
from ccmdist.data.triple import Triple
from ccmdist.errors import ShardError

Frame = NDArray[np.uint8]
NerveMask = NDArray[np.bool_]

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
    image, nerve_mask = resized_image(triple.image, size_px), resized_mask(triple.nerve_mask, size_px)
    yield replace(triple, image=image, nerve_mask=nerve_mask)
    for flip in flips:
        flipped = [np.ascontiguousarray(FLIPS[flip](frame)) for frame in (image, nerve_mask)]
        yield replace(triple, key=f"{triple.key}-{flip}", image=flipped[0], nerve_mask=flipped[1])


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
        source = np.arange(size_px) * edge_px // size_px
        return nerve_mask[np.ix_(source, source)]
    cover = Image.fromarray(nerve_mask.astype(np.float32)).resize((size_px, size_px), Image.Resampling.BOX)
    resized = np.asarray(cover) >= 0.5
    rows, columns = np.nonzero(skeletonize(nerve_mask))
    resized[rows * size_px // edge_px, columns * size_px // edge_px] = True
    return resized
