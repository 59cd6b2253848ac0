"""Pack a folder of frames, nerve masks and a table into a shard set: decoded, de-identified, split by subject.

Everything is checked before anything is written, and all problems are told at once.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.config.data import FolderShardsConfig, Split
from ccmdist.config.loading import resolved
from ccmdist.console import log, tracked
from ccmdist.data.images import Decoded, read_frame, read_inpaint_mask, read_mask, read_points
from ccmdist.data.manifest import SPLITS, Manifest
from ccmdist.data.pseudonyms import Pseudonyms
from ccmdist.data.source_table import OPTIONAL_FILES, Row, read_table
from ccmdist.data.splits import Subject, assigned_splits
from ccmdist.data.triple import Triple, TripleMeta, is_marked_synthetic, prompt_for
from ccmdist.data.writer import existing_set, write_set
from ccmdist.errors import ShardError

MAX_FILE_BYTES = 1 << 27
NUM_TOLD = 10
READERS = {"image": read_frame, "mask": read_mask, "inpaint_mask": read_inpaint_mask, "points": read_points}
PRIVATE_SETTINGS = ("source", "out", "table", "pseudonym_key_file")
"""Paths may name people or places, so they do not get into a manifest."""


@dataclass(frozen=True)
class Frame:
    """One row with its files decoded."""

    decoded: dict[str, Decoded]
    """By the table's column."""
    is_synthetic: bool
    digest: str
    """SHA-256 of its files."""


def write_folder_set(config: FolderShardsConfig) -> Manifest:
    """Pack the folder that ``config`` describes, or find it packed already.

    The same source, settings and key give the same bytes.

    Raises:
        ShardError: With the first problems of the table and its files, by line; or if `out` holds another set.
        ConfigError: If the fractions leave nothing for train.
    """
    path = config.source / config.table
    rows, problems = read_table(config.source, config.table)
    digests = _checked(rows, config, problems)
    if problems:
        raise _refusal(path, problems)
    key_file = config.pseudonym_key_file
    pseudonyms = Pseudonyms.read(key_file) if key_file else Pseudonyms.read_or_make(default_key_file(config.out))
    about = _about(config, pseudonyms, digests)
    if (manifest := existing_set(config.out, about)) is not None:
        return manifest
    splits = _splits(rows, config)
    for split, fraction in (("val", config.val_fraction), ("test", config.test_fraction)):
        if fraction and split not in splits.values():
            log.warning("%s: too few subjects for a %s split, it stays empty", path, split)
    if "train" not in splits.values():
        log.warning("%s: every subject has an inpaint_mask, so there is nobody to train on", path)
    split_of = {pseudonyms.subject(name): split for name, split in splits.items()}
    triples = _triples(rows, pseudonyms)
    samples = ((split_of[triple.meta.subject], triple) for triple in tracked(triples, "frames", len(rows)))
    return write_set(config.out, "real", samples, config.samples_per_shard, about)


def describe_folder_set(config: FolderShardsConfig) -> str:
    """What the table holds; the images themselves are not read.

    Raises:
        ShardError: With the first problems of the table, by line.
    """
    path = config.source / config.table
    rows, problems = read_table(config.source, config.table)
    if problems:
        raise _refusal(path, problems)
    groups = Counter(row.clinical_group or UNLABELLED for row in rows)
    splits = _splits(rows, config)
    frames = Counter(splits[row.subject] for row in rows)
    subjects = Counter(splits.values())
    told = ", ".join(f"{split} {frames[split]} of {subjects[split]} subjects" for split in SPLITS if subjects[split])
    grouped = ", ".join(f"{name} {groups[name]}" for name in sorted(groups))
    files = Counter(name for row in rows for name in row.files if name in OPTIONAL_FILES)
    optional = "".join(f"; {num} with {name}" for name, num in sorted(files.items()))
    return f"{path}: {len(rows)} frames; {told}; {grouped}{optional}"


def default_key_file(out: Path) -> Path:
    """Where the key of a set's pseudonyms lies: beside the set, so that a copy of the set goes without it."""
    return out.with_name(f"{out.name}.pseudonym-key")


def _checked(rows: list[Row], config: FolderShardsConfig, problems: list[str]) -> list[str]:
    """Decode every file once; the digests of the rows. What is wrong is added to ``problems``."""
    digests: list[str] = []
    lines: dict[str, int] = {}
    changes: Counter[str] = Counter()
    for row in rows:
        try:
            frame = _frame(row)
        except ShardError as error:
            problems.append(str(error))
            continue
        image, mask = frame.decoded["image"], frame.decoded["mask"]
        pixels = hashlib.sha256(image.pixels.tobytes()).hexdigest()
        if (line := lines.setdefault(pixels, row.line)) != row.line:
            problems.append(f"line {row.line}: the image shows the same as that of line {line}; keep one of them")
        if frame.is_synthetic and not config.allow_synthetic:
            problems.append(
                f"line {row.line}: image is marked as synthetic; remove the row, or allow it with allow_synthetic=true"
            )
        if not mask.pixels.any():
            log.warning("%s: line %d: mask is empty, the frame is packed as one without nerves", config.table, row.line)
        changes.update({"footer": image.is_cropped, "depth": image.is_scaled})
        digests.append(frame.digest)
    _tell_changes(config.source / config.table, changes)
    return digests


def _tell_changes(path: Path, changes: Counter[str]) -> None:
    if changes["footer"]:
        log.info("%s: %d frames of 384x484 px cropped to 384x384, footer dropped", path, changes["footer"])
    if changes["depth"]:
        log.info("%s: %d frames of 16 bits brought to 8, 0..65535 to 0..255", path, changes["depth"])


def _refusal(path: Path, problems: list[str]) -> ShardError:
    problems = sorted(problems, key=lambda problem: int(problem.removeprefix("line ").partition(":")[0]))
    more = [f"... and {len(problems) - NUM_TOLD} more"] if len(problems) > NUM_TOLD else []
    listed = "\n  ".join([*problems[:NUM_TOLD], *more])
    return ShardError(f"{path}: {len(problems)} problems, nothing was packed\n  {listed}")


def _frame(row: Row) -> Frame:
    contents = {name: _bytes(path, row.line, name) for name, path in row.files.items()}
    found = {name: READERS[name](data, f"line {row.line}: {name}") for name, data in contents.items()}
    height, width = found["image"].pixels.shape
    for name, decoded in found.items():
        if decoded.pixels.shape != (height, width):
            other_height, other_width = decoded.pixels.shape
            raise ShardError(
                f"line {row.line}: image is {width}x{height} px and {name} {other_width}x{other_height}, "
                "expected one size",
                f"make the {name} from the frame as it is",
            )
    hashes = {name: hashlib.sha256(data).digest() for name, data in contents.items()}
    told = [name.encode() + hashes[name] for name in OPTIONAL_FILES if name in hashes]
    digest = hashlib.sha256(b"".join([hashes["image"], hashes["mask"], *told])).hexdigest()
    return Frame(found, is_marked_synthetic(contents["image"]), digest)


def _bytes(path: Path, line: int, name: str) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ShardError(f"line {line}: {name} has {path.stat().st_size} bytes, expected at most {MAX_FILE_BYTES}")
        return path.read_bytes()
    except OSError as error:
        raise ShardError(f"line {line}: {name} cannot be read, {error.strerror}") from None


def _about(config: FolderShardsConfig, pseudonyms: Pseudonyms, digests: list[str]) -> dict[str, Any]:
    settings = {name: value for name, value in resolved(config).items() if name not in PRIVATE_SETTINGS}
    table = hashlib.sha256((config.source / config.table).read_bytes()).hexdigest()
    return {
        "made_by": "ccmdist shards folders",
        "settings": settings,
        "source_digest": pseudonyms.digest(table, *digests),
        "pseudonym_key_digest": pseudonyms.digest(),
    }


def _subjects(rows: list[Row]) -> dict[str, Subject]:
    groups = {row.subject: row.clinical_group for row in rows}
    counts = Counter(row.subject for row in rows)
    return {name: Subject(group, counts[name]) for name, group in groups.items()}


def _splits(rows: list[Row], config: FolderShardsConfig) -> dict[str, Split]:
    """The split of each subject; one with a frame that is to be repaired is tested: what is hidden teaches nothing."""
    to_repair = {row.subject for row in rows if row.inpaint_mask}
    others = _subjects([row for row in rows if row.subject not in to_repair])
    splits = assigned_splits(others, config.val_fraction, config.test_fraction, config.seed)
    return splits | dict.fromkeys(sorted(to_repair), "test")


def _triples(rows: list[Row], pseudonyms: Pseudonyms) -> Iterator[Triple]:
    """The samples in the order of their keys: where a frame stands in a table can say whose it is."""
    keys = {pseudonyms.sample(row.subject, row.name): row for row in rows}
    assert len(keys) == len(rows), "rows differ in their images"
    for key in sorted(keys):
        yield _triple(key, keys[key], pseudonyms)


def _triple(key: str, row: Row, pseudonyms: Pseudonyms) -> Triple:
    frame = _frame(row)
    meta = TripleMeta(
        prompt=prompt_for(row.clinical_group, row.eye, row.fields),
        clinical_group=row.clinical_group,
        subject=pseudonyms.subject(row.subject),
        eye=row.eye,
        um_per_px=row.um_per_px,
        source="synthetic" if frame.is_synthetic else "folders",
        fields=row.fields,
        provenance={"packed_from": "a marked image"} if frame.is_synthetic else None,
    )
    pixels = {name: decoded.pixels for name, decoded in frame.decoded.items()}
    return Triple(key, pixels["image"], pixels["mask"], meta, pixels.get("inpaint_mask"), pixels.get("points"))
