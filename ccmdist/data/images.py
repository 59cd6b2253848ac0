"""Frames and masks as people keep them, decoded to plain arrays: of a file, nothing but its pixels gets further.

A file is what its contents say, whatever its name is. Messages say where a file stands in a table, never its name.
"""

import io
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ccmdist.ccm.structure import POINT_CODES
from ccmdist.data.dicom import is_dicom, read_dicom
from ccmdist.data.triple import DECODING_ERRORS, MAX_IMAGE_PIXELS
from ccmdist.errors import ShardError

FORMATS: Final = ("PNG", "JPEG", "TIFF", "BMP", "DICOM")
PILLOW_FORMATS: Final = FORMATS[:4]
NATIVE_SHAPE: Final = (484, 384)
"""Rows and columns of a native Heidelberg export: the frame, and below it a footer with date and eye."""
FRAME_EDGE_PX: Final = 384
MIN_EDGE_PX: Final = 32
MAX_NERVE_FRACTION: Final = 0.5
MAX_BETWEEN_FRACTION: Final = 0.05
"""Of a mask's pixels, how many may be between a quarter and three quarters of the full range."""
MAX_CLASSES: Final = 8
_MIN_TOP_OF_16_BIT: Final = 4096
_ORIENTATION = 0x0112
_JPEG, _PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"
_DEPTHS = {"1": np.uint8, "L": np.uint8, "RGB": np.uint8, "I;16": np.uint16, "I;16L": np.uint16, "I;16B": np.uint16}
_OPAQUE = {"LA": "L", "RGBA": "RGB", "La": "L", "RGBa": "RGB"}


@dataclass(frozen=True)
class Decoded:
    """Pixels of one file, and what had to be done to them."""

    pixels: NDArray
    """(H, W): uint8 of a frame or of a map of points, bool of a mask."""
    is_cropped: bool
    """The footer of a native export was cut off."""
    is_scaled: bool
    """A 16-bit frame was brought to 8 bits: 0..65535 to 0..255, rounded, the same for every frame."""


def read_frame(data: bytes, where: str) -> Decoded:
    """The grey frame in ``data``.

    Args:
        data: Contents of an image file.
        where: Where the file stands, for messages.

    Raises:
        ShardError: If it is no grey, still, square, upright image of 8 or 16 bits with something on it.
    """
    grey, is_cropped = _cropped(_grey(data, where))
    height, width = grey.shape
    if height != width or height < MIN_EDGE_PX:
        raise ShardError(
            f"{where} is {width}x{height} px, expected a square of at least {MIN_EDGE_PX} px",
            "crop it; only the footer of a 384x484 px export is cropped here",
        )
    if grey.min() == grey.max():
        raise ShardError(f"{where} is empty, all its pixels are {grey.max()}", "remove the row")
    is_scaled = grey.dtype == np.uint16
    if is_scaled and grey.max() < _MIN_TOP_OF_16_BIT:
        raise ShardError(
            f"{where} has 16 bits but no value above {grey.max()}: the full range, brought to 8 bits, would be black",
            "scale the values of all frames alike, so that 65535 is white, or save 8 bits",
        )
    pixels = ((grey.astype(np.uint32) + 128) // 257).astype(np.uint8) if is_scaled else grey
    return Decoded(pixels, is_cropped, bool(is_scaled))


def read_mask(data: bytes, where: str) -> Decoded:
    """The nerve mask in ``data``; where it is True there is a nerve.

    With two values the larger one is nerve, whether 1 or 255. With many, as smooth edges make them, or in a JPEG, what
    reaches half of the full range is nerve, if at most 5 % of the pixels lie between a quarter and three quarters.
    From three to eight values are classes: which of them are nerves is not ours to guess.

    Args:
        data: Contents of an image file.
        where: Where the file stands, for messages.

    Raises:
        ShardError: If it is no grey still image, holds classes or shades, or calls more than half of the frame nerve.
    """
    grey, is_cropped = _cropped(_grey(data, where))
    nerve_mask = _two_valued(grey, data, where)
    if nerve_mask.mean() > MAX_NERVE_FRACTION:
        raise ShardError(
            f"{where} calls {nerve_mask.mean():.0%} of the frame nerve, expected at most {MAX_NERVE_FRACTION:.0%}",
            "nerves are white: invert it if they are black",
        )
    return Decoded(nerve_mask, is_cropped, False)


def read_inpaint_mask(data: bytes, where: str) -> Decoded:
    """The hole in ``data``, bool; where it is True the frame is to be filled. Values count as those of a nerve mask.

    Raises:
        ShardError: If it is no grey still image, holds classes or shades, or covers nothing.
    """
    grey, is_cropped = _cropped(_grey(data, where))
    hole = _two_valued(grey, data, where)
    if not hole.any():
        raise ShardError(f"{where} covers nothing", "leave the cell blank where the whole frame is known")
    return Decoded(hole, is_cropped, False)


def read_points(data: bytes, where: str) -> Decoded:
    """The map of points in ``data``, uint8, one pixel for each point.

    Raises:
        ShardError: If it is no grey PNG, or holds other values than the codes of points.
    """
    if not data.startswith(_PNG):
        raise ShardError(f"{where} is no PNG", "save it as grey PNG: other formats may change its codes")
    grey, is_cropped = _cropped(_grey(data, where))
    if not np.isin(grey, POINT_CODES).all():
        raise ShardError(
            f"{where} holds {grey.max()}, expected only the codes 0 to {max(POINT_CODES)}",
            "write one pixel for each point: 1 branch point, 2 end, 3 dendritic cell",
        )
    return Decoded(grey.astype(np.uint8), is_cropped, False)


def _two_valued(grey: NDArray, data: bytes, where: str) -> NDArray[np.bool_]:
    values = np.unique(grey)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        return _thresholded(grey, values, data.startswith(_JPEG), where)
    drawn: NDArray[np.bool_] = grey > 0
    return drawn


def _thresholded(grey: NDArray, values: NDArray, is_jpeg: bool, where: str) -> NDArray[np.bool_]:
    top = int(np.iinfo(grey.dtype).max)
    between = float(((grey > top // 4) & (grey < top - top // 4)).mean())
    is_two_toned = values[0] <= top // 4 and values[-1] >= top - top // 4
    is_graded = is_jpeg or len(values) == 2 or len(values) > MAX_CLASSES
    if is_two_toned and is_graded and between <= MAX_BETWEEN_FRACTION:
        return grey > top // 2
    shown = ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
    raise ShardError(
        f"{where} is no mask: it holds {len(values)} values ({shown}), {between:.0%} of its pixels are in between",
        "save it with two values, 0 and 255, what it marks white",
    )


def _cropped(grey: NDArray) -> tuple[NDArray, bool]:
    """Without the footer of a native export."""
    is_native = grey.shape == NATIVE_SHAPE
    return (grey[:FRAME_EDGE_PX], True) if is_native else (grey, False)


def _grey(data: bytes, where: str) -> NDArray:
    """The one channel of an image, uint8 or uint16."""
    if is_dicom(data):
        pixels, is_written_on = read_dicom(data, where)
        if is_written_on and pixels.shape != NATIVE_SHAPE:
            raise ShardError(
                f"{where} says that text is burnt into it (BurnedInAnnotation)",
                "blank the text; only the footer of a 384x484 px export is cropped here",
            )
        return pixels
    try:
        with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
            _check_header(image, where)
            image.load()
            return _one_channel(image, where)
    except DECODING_ERRORS:
        raise ShardError(f"{where} is no {', '.join(FORMATS)} that can be read", "save it as PNG") from None


def _check_header(image: Image.Image, where: str) -> None:
    """What can be told without decoding, so that no huge picture is decoded."""
    if image.width * image.height > MAX_IMAGE_PIXELS:
        size = f"{image.width}x{image.height} px"
        raise ShardError(f"{where} has {size}, expected at most {MAX_IMAGE_PIXELS} in all", "crop it")
    if (num_pictures := getattr(image, "n_frames", 1)) > 1:
        raise ShardError(f"{where} holds {num_pictures} pictures, expected one", "save each frame as its own file")
    if image.getexif().get(_ORIENTATION, 1) != 1:
        raise ShardError(f"{where} is turned by its metadata, so it may not fit its mask", "save both upright, as PNG")


def _one_channel(image: Image.Image, where: str) -> NDArray:
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in _OPAQUE:
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ShardError(f"{where} is partly transparent", "save it without an alpha channel")
        image = image.convert(_OPAQUE[image.mode])
    if image.mode not in _DEPTHS:
        raise ShardError(f"{where} is of mode {image.mode}, expected grey with 8 or 16 bits", "save it as grey PNG")
    pixels = np.asarray(image).astype(_DEPTHS[image.mode]) * (255 if image.mode == "1" else 1)
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise ShardError(f"{where} has colours, expected grey", "save it as grey PNG, without overlays")
        pixels = pixels[..., 0]
    return pixels
