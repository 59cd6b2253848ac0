"""A sample of a shard: image, nerve mask and what is known about them. The one place that knows a shard's members.

* ``KEY.image.png``: 8-bit grey. A synthetic image carries a machine-readable mark (XMP in an iTXt chunk); that of a
  frame of which a hole was filled says that a part of it is synthetic.
* ``KEY.mask.png``: 8-bit grey, 0 or 255 only, of the same size.
* ``KEY.inpaint_mask.png``, if the sample has one: likewise, 255 where the image is to be filled, or was.
* ``KEY.points.png``, if the sample has one: 8-bit grey, codes of :mod:`ccmdist.ccm.structure`, one pixel a point.
* ``KEY.json``: the fields of :class:`TripleMeta`.
"""

import hashlib
import io
import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.ccm.prompts import FIELD_WORDS, prompt
from ccmdist.ccm.structure import POINT_CODES
from ccmdist.errors import ShardError

Eye = Literal["OD", "OS"]
Source = Literal["phantom", "folders", "synthetic"]

EYES: Final[tuple[Eye, ...]] = get_args(Eye)
OTHER_EYE: Final[Mapping[Eye, Eye]] = {"OD": "OS", "OS": "OD"}
IMAGE, MASK, INPAINT_MASK, POINTS, META = "image.png", "mask.png", "inpaint_mask.png", "points.png", "json"
MEMBERS: Final = (IMAGE, MASK, INPAINT_MASK, POINTS, META)
"""Endings of a sample's members, in the order in which they stand in a tar: META is the last of each sample."""
OPTIONAL: Final = (INPAINT_MASK, POINTS)
REQUIRED: Final = (IMAGE, MASK, META)

MAX_KEY_LENGTH: Final = 64
MAX_IMAGE_PIXELS: Final = 1 << 24
DECODING_ERRORS: Final = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises about bytes that are not the image they should be."""

_KEY = re.compile(r"[a-z0-9_-]+")
_MARK = "rainedAlgorithmicMedia"
SYNTHETIC_MARK: Final = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" Iptc4xmpExt:DigitalSourceType='
    '"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/></rdf:RDF></x:xmpmeta>'
)
"""XMP of every image that a model has drawn whole. This and the next are the only texts in pictures."""
COMPOSITE_MARK: Final = SYNTHETIC_MARK.replace("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")
"""XMP of every image of which a model has filled a hole."""


@dataclass(frozen=True)
class TripleMeta:
    """What is known about a frame. Nothing in it is free text, and nothing names a person."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str
    """As :func:`prompt_for` words it; of a synthetic sample, the prompt it was drawn with, whatever its group."""
    clinical_group: ClinicalGroup | None
    """None if it is not known."""
    subject: str
    """Pseudonym of the person, ``[a-z0-9_-]+``; splits are made by subject."""
    eye: Eye | None
    um_per_px: float
    source: Source
    fields: dict[str, str] = field(default_factory=dict)
    """Closed codes of :data:`~ccmdist.ccm.prompts.FIELD_WORDS` other than the eye."""
    labels: dict[str, float] = field(default_factory=dict)
    """Constructed biomarkers of a phantom; empty for every other frame."""
    provenance: dict[str, Any] | None = None
    """How a synthetic sample was made; None for every other frame."""


@dataclass(frozen=True, eq=False)
class Triple:
    """One sample."""

    key: str
    """``[a-z0-9_-]+``, unique in its set."""
    image: NDArray[np.uint8]
    """(H, W), grey."""
    nerve_mask: NDArray[np.bool_]
    """(H, W), True on nerves."""
    meta: TripleMeta
    inpaint_mask: NDArray[np.bool_] | None = None
    """(H, W), True where the image is to be filled: of a real frame, what cannot be seen; of a synthetic one, what was
    drawn. Never empty."""
    points: NDArray[np.uint8] | None = None
    """(H, W), codes of :mod:`ccmdist.ccm.structure`, one pixel for each point."""


_META: TypeAdapter[TripleMeta] = TypeAdapter(TripleMeta)


def prompt_for(clinical_group: ClinicalGroup | None, eye: Eye | None, fields: Mapping[str, str]) -> str:
    """The prompt of a frame with these codes.

    Raises:
        ShardError: If one of them is outside the closed vocabularies.
    """
    return prompt(clinical_group, {"eye": eye, **fields} if eye else fields)


def mirrored(meta: TripleMeta) -> TripleMeta:
    """The fields of a frame's mirror image, which shows the other eye and whose prompt says so; twice, ``meta`` itself.

    That a mirrored right eye passes for a left one is our choice: the nerves' course beside nose and temple is
    mirrored between the eyes of a person. Of a whorl's sense of rotation that is not known.
    """
    if meta.eye is None:
        return meta
    other, words = OTHER_EYE[meta.eye], FIELD_WORDS["eye"]
    return replace(meta, eye=other, prompt=meta.prompt.replace(words[meta.eye], words[other]))


def members_of(triple: Triple) -> dict[str, bytes]:
    """The members of a sample by their endings, in the order in which a tar holds them. Equal samples give equal bytes.

    Raises:
        ShardError: If the sample could not be read back: its key, shapes, types or fields are not what they should be.
    """
    where = f"sample {triple.key}"
    check_key(triple.key, where)
    image, nerve_mask = triple.image, triple.nerve_mask
    if image.dtype != np.uint8 or nerve_mask.dtype != np.bool_ or image.ndim != 2 or image.shape != nerve_mask.shape:
        raise ShardError(
            f"{where}: image {image.dtype} {image.shape} and nerve_mask {nerve_mask.dtype} {nerve_mask.shape}, "
            "expected uint8 and bool of one shape (H, W)"
        )
    optional = _optional_pixels(triple)
    for ending, pixels in optional.items():
        _check_optional(ending, pixels, image, where)
    values = {name: value for name, value in asdict(triple.meta).items() if name != "provenance" or value is not None}
    try:
        text = json.dumps(values, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ShardError(f"{where}: its fields cannot be written as JSON ({error})") from None
    meta_of(text.encode(), where)
    mark = SYNTHETIC_MARK if triple.inpaint_mask is None else COMPOSITE_MARK
    return {
        IMAGE: _png(image, mark if triple.meta.provenance is not None else ""),
        MASK: _png(nerve_mask.astype(np.uint8) * 255),
        **{ending: _png(pixels) for ending, pixels in optional.items()},
        META: text.encode(),
    }


def triple_of(key: str, members: Mapping[str, bytes], where: str) -> Triple:
    """The sample that ``members`` hold.

    Args:
        key: Of the sample.
        members: Their contents by their endings.
        where: Path of the shard, for messages.

    Raises:
        ShardError: If a member is missing, unknown or not what it should be; names the sample.
    """
    check_key(key, where)
    where = f"{where}: sample {key}"
    if missing := [ending for ending in REQUIRED if ending not in members]:
        raise ShardError(f"{where}: {' and '.join(missing)} is missing", "make or copy the shard anew")
    if unknown := [ending for ending in members if ending not in MEMBERS]:
        raise ShardError(
            f"{where}: unknown member {unknown[0]!r}, expected only {', '.join(MEMBERS)}", "remove it from the set"
        )
    meta = meta_of(members[META], where)
    image, mask = _pixels(members[IMAGE], f"{where}: {IMAGE}"), _pixels(members[MASK], f"{where}: {MASK}")
    _check_size(MASK, mask, image, where)
    _check_two_valued(MASK, mask, where)
    optional = {ending: _pixels(members[ending], f"{where}: {ending}") for ending in OPTIONAL if ending in members}
    for ending, pixels in optional.items():
        _check_optional(ending, pixels, image, where)
    if is_marked_synthetic(members[IMAGE]) != (meta.provenance is not None):
        raise ShardError(
            f"{where}: {IMAGE} and {META} disagree on whether it is synthetic", "make or copy the shard anew"
        )
    hole = optional.get(INPAINT_MASK)
    return Triple(key, image, mask == 255, meta, None if hole is None else hole == 255, optional.get(POINTS))


def meta_of(data: bytes, where: str) -> TripleMeta:
    """The fields of a sample.

    Args:
        data: Its member ``KEY.json``.
        where: Shard and sample, for messages.

    Raises:
        ShardError: If a field is missing, unknown or not what it should be.
    """
    try:
        meta = _META.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"])) or "as a whole"
        raise ShardError(f"{where}: {META}, {name}: {first['msg']}", "make or copy the shard anew") from None
    check_key(meta.subject, f"{where}: {META}, subject")
    if not (math.isfinite(meta.um_per_px) and meta.um_per_px > 0):
        raise ShardError(f"{where}: {META}, um_per_px: {meta.um_per_px} is not a length")
    if (meta.provenance is None) == (meta.source == "synthetic"):
        raise ShardError(f"{where}: {META}, provenance: stands in synthetic samples, in each of them and in no other")
    _check_prompt(meta, where)
    return meta


def mask_sha256(nerve_mask: NDArray[np.bool_]) -> str:
    """Identity of a mask: SHA-256 of its pixels row by row, one byte each, 0 or 1."""
    return hashlib.sha256(np.ascontiguousarray(nerve_mask).astype(np.uint8).tobytes()).hexdigest()


def check_key(key: str, where: str) -> None:
    """Refuse a key that could be mistaken for a path, or that says more than a pseudonym does.

    Raises:
        ShardError: If it is not made of ``a-z 0-9 _ -``, or longer than 64 characters.
    """
    if not _KEY.fullmatch(key) or len(key) > MAX_KEY_LENGTH:
        shown = ascii(key if len(key) <= MAX_KEY_LENGTH else key[:MAX_KEY_LENGTH] + "...")
        raise ShardError(
            f"{where}: {shown} is not a key, expected at most {MAX_KEY_LENGTH} of a-z 0-9 _ -", "pack the set again"
        )


def is_marked_synthetic(data: bytes) -> bool:
    """Whether an image file says that a model made it, or parts of it: IPTC's digital source type, in any chunk.

    Args:
        data: Contents of a file; what is no image carries no mark.
    """
    if _MARK.encode() in data:
        return True
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
            if png.width * png.height > MAX_IMAGE_PIXELS:
                return False
            texts = getattr(png, "text", {})  # compressed chunks, which the search above does not see
    except DECODING_ERRORS:
        return False
    return any(_MARK in str(text) for text in texts.values())


def _optional_pixels(triple: Triple) -> dict[str, NDArray[np.uint8]]:
    """The optional members that a sample has, as 8-bit pictures."""
    found: dict[str, NDArray[np.uint8]] = {}
    if triple.inpaint_mask is not None:
        found[INPAINT_MASK] = triple.inpaint_mask.astype(np.uint8) * 255
    if triple.points is not None:
        found[POINTS] = triple.points
    return found


def _check_optional(ending: str, pixels: NDArray[np.uint8], image: NDArray[np.uint8], where: str) -> None:
    _check_size(ending, pixels, image, where)
    if ending == INPAINT_MASK:
        _check_two_valued(ending, pixels, where)
        if not pixels.any():
            raise ShardError(
                f"{where}: {ending} covers nothing", "leave it out where the whole image is known, or draw the hole"
            )
    elif pixels.dtype != np.uint8 or not np.isin(pixels, POINT_CODES).all():
        raise ShardError(
            f"{where}: {ending} holds other values than the codes {', '.join(map(str, POINT_CODES))}",
            "write one pixel for each point: 1 branch point, 2 end, 3 dendritic cell",
        )


def _check_size(ending: str, pixels: NDArray[np.uint8], image: NDArray[np.uint8], where: str) -> None:
    if pixels.shape != image.shape:
        raise ShardError(f"{where}: {IMAGE} is {_size(image)} and {ending} {_size(pixels)}, expected one size")


def _check_two_valued(ending: str, pixels: NDArray[np.uint8], where: str) -> None:
    if not np.isin(pixels, (0, 255)).all():
        raise ShardError(
            f"{where}: {ending} holds other values than 0 and 255", "make it two-valued and pack the set again"
        )


def _png(pixels: NDArray[np.uint8], mark: str = "") -> bytes:
    info = PngInfo()
    if mark:
        info.add_itxt("XML:com.adobe.xmp", mark)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def _pixels(data: bytes, where: str) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as png:
            if png.width * png.height > MAX_IMAGE_PIXELS:
                raise ShardError(f"{where} has {png.width * png.height} pixels, expected at most {MAX_IMAGE_PIXELS}")
            if png.mode != "L":
                raise ShardError(
                    f"{where} is of mode {png.mode}, expected 8-bit grey (L)", "make or copy the shard anew"
                )
            return np.array(png)
    except DECODING_ERRORS:
        raise ShardError(f"{where} is not a PNG that can be read", "make or copy the shard anew") from None


def _check_prompt(meta: TripleMeta, where: str) -> None:
    groups = (*CLINICAL_GROUPS, None) if meta.source == "synthetic" else (meta.clinical_group,)
    try:
        known = [prompt_for(clinical_group, meta.eye, meta.fields) for clinical_group in groups]
    except ShardError as error:
        raise ShardError(f"{where}: {META}, {error.message}", error.remedy) from None
    if meta.prompt not in known:
        raise ShardError(
            f"{where}: {META}, prompt: is not the wording for its codes, '{known[0]}'", "pack the set again"
        )


def _size(pixels: NDArray[np.uint8]) -> str:
    height, width = pixels.shape
    return f"{height}x{width} px"
