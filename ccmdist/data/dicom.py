"""Single grey DICOM pictures: of a file, its pixels and how they are stored are read, and no other element.

What a file says of a person never becomes an object here, so no message, log or warning can repeat it.
"""

import io
import warnings
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.data.triple import MAX_IMAGE_PIXELS
from ccmdist.errors import ShardError

UNCOMPRESSED: Final = {
    "1.2.840.10008.1.2": "little",
    "1.2.840.10008.1.2.1": "little",
    "1.2.840.10008.1.2.2": "big",
}
"""Transfer syntaxes that are read, and their order of bytes."""
TAGS: Final = (
    "Rows",
    "Columns",
    "NumberOfFrames",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "BurnedInAnnotation",
    "PixelData",
)
"""All that is read."""
GREY: Final = ("MONOCHROME1", "MONOCHROME2")
"""Of the first, the lowest value is white."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HEADER_BYTES = 4096
_MARK = b"DICM"
_MARK_AT = 128


def is_dicom(data: bytes) -> bool:
    """Whether a file says that it is DICOM, whatever its name is."""
    return data[_MARK_AT : _MARK_AT + len(_MARK)] == _MARK


def read_dicom(data: bytes, where: str) -> tuple[NDArray[Any], bool]:
    """The grey picture of a DICOM file.

    Values of fewer bits than they are stored in are spread to 8 or 16 bits, so that white is the full range.

    Args:
        data: Contents of the file.
        where: Where it stands, for messages.

    Returns:
        Pixels (H, W), uint8 or uint16, and whether the file says that something is written into them.

    Raises:
        ShardError: If it is compressed, holds several pictures or colours, or does not hold what it says.
    """
    elements = _elements(data, where)
    height, width = _whole(elements, "Rows"), _whole(elements, "Columns")
    num_pictures, bits, stored = (_whole(elements, name) for name in ("NumberOfFrames", "BitsAllocated", "BitsStored"))
    if num_pictures > 1:
        raise ShardError(f"{where} holds {num_pictures} pictures, expected one", "save each frame as its own file")
    if elements.get("PhotometricInterpretation") not in GREY or _whole(elements, "SamplesPerPixel") > 1:
        raise ShardError(f"{where} has colours, expected grey", "save it as grey PNG, without overlays")
    if height * width > MAX_IMAGE_PIXELS:
        raise ShardError(f"{where} has {width}x{height} px, expected at most {MAX_IMAGE_PIXELS} in all", "crop it")
    is_plain = bits in (8, 16) and 0 < stored <= bits and _whole(elements, "HighBit", stored - 1) == stored - 1
    if not is_plain or _whole(elements, "PixelRepresentation") != 0:
        raise ShardError(
            f"{where} stores {stored} of {bits} bits, or numbers with a sign; expected 8 or 16 bits without",
            "save it as grey PNG",
        )
    pixels = _pixels(elements, (height, width), bits, where)
    if stored < bits and pixels.max(initial=0) >> stored:
        raise ShardError(f"{where} holds values of more than the {stored} bits that it says", "save it as grey PNG")
    if elements["PhotometricInterpretation"] == "MONOCHROME1":
        pixels = ((1 << stored) - 1 - pixels.astype(np.int64)).astype(pixels.dtype)
    return pixels << (bits - stored), elements.get("BurnedInAnnotation") == "YES"


def _elements(data: bytes, where: str) -> dict[str, Any]:
    """The values of TAGS, with the order of bytes under "order"; only these are parsed."""
    import pydicom
    from pydicom import config

    # pydicom would inflate such a file, however large it becomes, before it says what it is.
    syntax = _DEFLATED.decode() if _DEFLATED in data[:_HEADER_BYTES] else ""
    found: dict[str, Any] = {}
    # Whatever is wrong with other elements concerns nobody, and a warning would quote them.
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        try:
            if not syntax:
                file = pydicom.dcmread(io.BytesIO(data), specific_tags=list(TAGS))
                syntax = str(file.file_meta.TransferSyntaxUID)
                found = {name: file[name].value for name in TAGS if name in file}
        # It raises nearly anything about bytes that are not what they should be.
        except Exception:
            raise ShardError(f"{where} is a DICOM file that cannot be read", "save it as PNG") from None
    if syntax not in UNCOMPRESSED:
        raise ShardError(f"{where} is a compressed DICOM file", "uncompress it, as `gdcmconv --raw` does")
    return found | {"order": UNCOMPRESSED[syntax]}


def _whole(elements: dict[str, Any], name: str, otherwise: int | None = None) -> int:
    """A whole number; 1 picture, 1 sample and no sign unless the file says otherwise, and 0 for all else."""
    defaults = {"NumberOfFrames": 1, "SamplesPerPixel": 1}
    value = elements.get(name, defaults.get(name, 0) if otherwise is None else otherwise)
    try:
        return int(value)
    except (TypeError, ValueError):
        return -1


def _pixels(elements: dict[str, Any], shape: tuple[int, int], bits: int, where: str) -> NDArray[Any]:
    content = elements.get("PixelData")
    num_bytes = shape[0] * shape[1] * bits // 8
    # An odd number of bytes is padded to an even one.
    if not isinstance(content, bytes) or min(shape) < 1 or len(content) not in (num_bytes, num_bytes + num_bytes % 2):
        raise ShardError(f"{where} does not hold the {shape[1]}x{shape[0]} px that it says", "copy the file anew")
    kind = {8: "u1", 16: "<u2" if elements["order"] == "little" else ">u2"}[bits]
    return np.frombuffer(content[:num_bytes], kind).reshape(shape).astype(np.uint8 if bits == 8 else np.uint16)
