"""Every byte of a shard set against what may stand there: nothing but pixels, codes, numbers and digests.

The reader takes what it needs and passes over the rest. Here the rest is the matter: comments in pictures, owners in
headers, text behind the end of a file, fields that nobody reads.
"""

import json
import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_args

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.data.manifest import MANIFEST, SPLITS, Manifest, ShardEntry
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import COMPOSITE_MARK, META, SYNTHETIC_MARK, check_key
from ccmdist.errors import ShardError

NUM_TOLD: Final = 10
WORDS: Final = (
    *(*CLINICAL_GROUPS, *SPLITS, "untuned", "unknown", "bf16", "fp32", "nf4", "given", "next_group"),
    *("points", "mask_and_points", "completion"),
    *("none", *get_args(NetworkKind)),
)
"""Texts that a field of a provenance may hold besides digests and the key of its source."""
SOURCE_KEY: Final = "source_key"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_XMP_TEXT = b"XML:com.adobe.xmp\0\0\0\0\0"
_MARKS = [_XMP_TEXT + mark.encode() for mark in (SYNTHETIC_MARK, COMPOSITE_MARK)]
_BLOCK = tarfile.BLOCKSIZE


def audit_set(folder: Path, manifest: Manifest) -> str:
    """Look at every byte of a set's shards and at every field of its manifest; what was found to be right.

    Raises:
        ShardError: With the first problems: what stands where nothing may stand.
    """
    problems = [*_of_manifest(manifest)]
    num_bytes = 0
    for entry in manifest.shards:
        for _ in read_shard(folder, entry):
            pass
        problems += [f"{entry.name}: {problem}" for problem in _of_shard(folder, entry)]
        num_bytes += entry.num_bytes
    if problems:
        more = [f"... and {len(problems) - NUM_TOLD} more"] if len(problems) > NUM_TOLD else []
        listed = "\n  ".join([*problems[:NUM_TOLD], *more])
        raise ShardError(
            f"{folder}: {len(problems)} places hold what a set may not hold\n  {listed}", "pack or draw the set again"
        )
    return f"{folder}: {num_bytes} bytes in {len(manifest.shards)} shards hold pixels, codes, numbers and digests only"


def is_telling_nothing(value: Any) -> bool:
    """Whether a value is a number, a truth value, nothing, a digest or a word of WORDS."""
    if isinstance(value, str):
        return value in WORDS or _DIGEST.fullmatch(value) is not None
    return value is None or isinstance(value, bool | int | float)


def _of_manifest(manifest: Manifest) -> Iterator[str]:
    for entry in manifest.shards:
        for subject in entry.subjects:
            try:
                check_key(subject, f"{MANIFEST}: {entry.name}: subject")
            except ShardError as error:
                yield error.message


def _of_shard(folder: Path, entry: ShardEntry) -> Iterator[str]:
    data = (folder / entry.name).read_bytes()
    at = 0
    while any(header := data[at : at + _BLOCK]):
        info = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        if header != _plain_header(info.name, info.size):
            yield f"{info.name}: its header says more than a name and a size, such as an owner or a time"
        at += _BLOCK
        content, padding = data[at : at + info.size], data[at + info.size : at + info.size + -info.size % _BLOCK]
        if any(padding):
            yield f"{info.name}: bytes stand between it and the next member"
        yield from (f"{info.name}: {problem}" for problem in _of_member(info.name, content))
        at += len(content) + len(padding)
    if any(data[at:]):
        yield "bytes stand behind its end"


def _plain_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _of_member(name: str, content: bytes) -> Iterator[str]:
    key, _, ending = name.partition(".")
    if ending == META:
        yield from _of_fields(key, content)
    else:
        yield from _of_png(content)


def _of_fields(key: str, content: bytes) -> Iterator[str]:
    """What the reader, which knows the fields and their codes, does not look at."""
    values = json.loads(content)
    if (json.dumps(values, sort_keys=True) + "\n").encode() != content:
        yield "is not written as we write it: a field stands twice, or text between the fields"
    yield from _of_names("labels", values["labels"])
    provenance = values.get("provenance") or {}
    yield from _of_names("provenance", provenance)
    for name, value in provenance.items():
        if name == SOURCE_KEY:
            # A flipped view adds its name, an image its number.
            if not isinstance(value, str) or not key.startswith(value):
                yield f"provenance {name} is not the beginning of the sample's key"
        elif not is_telling_nothing(value):
            yield f"provenance {name} is neither a number nor a digest nor a known word"


def _of_names(field: str, values: dict[str, Any]) -> Iterator[str]:
    for name in values:
        if not _NAME.fullmatch(name):
            yield f"{field}: a name is not made of a-z 0-9 _"


def _of_png(content: bytes) -> Iterator[str]:
    at, pixels, num_rows, width = len(_SIGNATURE), b"", 0, 0
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        at += length + 12
        if kind == b"IHDR":
            width, num_rows = struct.unpack(">II", body[:8])
        elif kind == b"IDAT":
            pixels += body
        elif kind == b"IEND":
            if length or at < len(content):
                yield "bytes stand behind the end of its picture"
            break
        elif kind != b"iTXt" or body not in _MARKS:
            yield f"its picture has a chunk {kind.decode('ascii', 'replace')}, which may hold text"
    stream = zlib.decompressobj()
    # One byte says how a row is filtered; a picture of more bytes than that hides some.
    num_bytes = num_rows * (width + 1)
    if len(stream.decompress(pixels, num_bytes + 1)) != num_bytes or stream.unused_data or not stream.eof:
        yield "the compressed part of its picture holds more than the picture"
