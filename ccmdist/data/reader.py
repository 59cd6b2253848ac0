"""Read shard sets. The manifest is trusted, a tar is not: it must be the very file that the manifest names.

Its hash is compared before the first sample leaves, so damage never reaches a caller as other pixels, and nothing in
a tar is a path, a link or code here: of the format, only plain members with the known endings exist.
"""

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from pathlib import Path

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.config.data import Split
from ccmdist.data.manifest import MANIFEST, SPLITS, Kind, Manifest, ShardEntry, read_manifest
from ccmdist.data.triple import MEMBERS, META, REQUIRED, Source, Triple, TripleMeta, check_key, meta_of, triple_of
from ccmdist.errors import OF_THE_MACHINE, ShardError

MAX_MEMBER_BYTES = 1 << 26
ANEW = "make or copy the shard anew"
_BLOCK = tarfile.BLOCKSIZE
_NUM_NAMED = 10
_SOURCES: dict[Kind, tuple[Source, ...]] = {
    "real": ("folders", "synthetic"),
    "phantom": ("phantom",),
    "synthetic": ("synthetic",),
}


@dataclass(frozen=True)
class SetReport:
    """What a verified set holds."""

    folder: Path
    manifest: Manifest

    @property
    def group_counts(self) -> dict[str, int]:
        """Samples of each clinical group that occurs, ``unlabelled`` included."""
        counts: Counter[str] = Counter()
        for shard in self.manifest.shards:
            counts.update(shard.group_counts)
        return dict(sorted(counts.items()))

    def __str__(self) -> str:
        shards = self.manifest.shards
        splits = [(split, self.manifest.of_split(split)) for split in SPLITS]
        told = [
            f"{split} {sum(shard.num_samples for shard in found)} of "
            f"{len({subject for shard in found for subject in shard.subjects})} subjects"
            for split, found in splits
            if found
        ]
        groups = ", ".join(f"{name} {count}" for name, count in self.group_counts.items())
        return (
            f"{self.folder}: {self.manifest.kind} set, {len(shards)} shards, {self.manifest.num_samples} samples, "
            f"{sum(shard.num_bytes for shard in shards)} bytes; {', '.join(told)}; {groups}"
        )


def read_shard(folder: Path, entry: ShardEntry) -> Iterator[Triple]:
    """The samples of one shard, in its order.

    Args:
        folder: Of the set.
        entry: From the set's manifest.

    Raises:
        ShardError: If the tar is not the one that was written, or holds what no sample has; names shard and sample.
    """
    path = folder / entry.name
    with _opened(path) as tar:
        _check_bytes(tar, path, entry)
        yield from _checked(_triples(tar, path), path, entry)


def read_places(folder: Path, entry: ShardEntry) -> Iterator[tuple[Triple, int, bytes]]:
    """The samples of one shard, each with where its members begin in the tar and what :func:`sample_in` reads of them.

    Raises:
        ShardError: As :func:`read_shard`.
    """
    path = folder / entry.name
    with _opened(path) as tar:
        _check_bytes(tar, path, entry)
        start = 0
        for triple in _checked(_triples(tar, path), path, entry):
            stop = tar.tell()
            tar.seek(start)
            yield triple, start, tar.read(stop - start)
            start = stop


def sample_in(data: bytes, path: Path) -> Triple:
    """The one sample whose members are ``data``, a stretch of the tar at ``path``.

    Raises:
        ShardError: If it is not what a sample has to be.
    """
    return next(_triples(BufferedReader(BytesIO(data)), path))


def read_keys(folder: Path, entry: ShardEntry) -> list[str]:
    """The keys of one shard, in its order, off the headers alone: bytes of members are not read, hashes not compared.

    Raises:
        ShardError: If the tar is missing, or a header cannot be read.
    """
    path = folder / entry.name
    with _opened(path) as tar:
        return list(dict.fromkeys(info.name.partition(".")[0] for info in _headers(tar, path)))


def read_metas(folder: Path, entry: ShardEntry) -> Iterator[tuple[str, TripleMeta]]:
    """Keys and fields of one shard, in its order; images and masks are skipped, hashes not compared.

    Raises:
        ShardError: If the tar is missing, or a header or the fields of a sample cannot be read.
    """
    path = folder / entry.name
    with _opened(path) as tar:
        for info in _headers(tar, path):
            key, _, ending = info.name.partition(".")
            if ending == META:
                if info.size > MAX_MEMBER_BYTES:
                    raise ShardError(f"{path}: member {info.name} has {info.size} bytes", ANEW)
                start = tar.tell()
                yield key, meta_of(tar.read(info.size), f"{path}: sample {key}")
                tar.seek(start)


def read_split(folder: Path, split: Split) -> Iterator[Triple]:
    """The samples of one split of a set, shard by shard.

    Raises:
        ShardError: As :func:`read_shard`, or if the set has no such split or two samples have one key.
    """
    shards = read_manifest(folder).of_split(split)
    if not shards:
        raise ShardError(f"{folder}: the set has no {split} split", f"make it with a {split} fraction above zero")
    keys: set[str] = set()
    for shard in shards:
        for triple in read_shard(folder, shard):
            if triple.key in keys:
                raise ShardError(
                    f"{folder / shard.name}: sample {triple.key} is in another shard too", "make the set again"
                )
            keys.add(triple.key)
            yield triple


def verify_set(folder: Path) -> SetReport:
    """Read every shard of a set once and compare it with the manifest.

    Raises:
        ShardError: With the first problem of each shard; names shard and sample.
    """
    manifest = read_manifest(folder)
    names = {shard.name for shard in manifest.shards}
    problems = [
        f"{path}: is a tar that {MANIFEST} does not name"
        for path in sorted(folder.glob("*.tar"))
        if path.name not in names
    ]
    keys: dict[str, str] = {}
    for shard in manifest.shards:
        try:
            for triple in read_shard(folder, shard):
                _check_in_set(triple, shard, folder, manifest.kind, keys)
        except ShardError as error:
            problems.append(str(error))
    if problems:
        more = [f"... and {len(problems) - _NUM_NAMED} more"] if len(problems) > _NUM_NAMED else []
        head = f"{folder}: {len(problems)} problems\n  " if len(problems) > 1 else ""
        raise ShardError(head + "\n  ".join([*problems[:_NUM_NAMED], *more]))
    return SetReport(folder, manifest)


def _check_in_set(triple: Triple, shard: ShardEntry, folder: Path, kind: Kind, keys: dict[str, str]) -> None:
    where = f"{folder / shard.name}: sample {triple.key}"
    if (other := keys.setdefault(triple.key, shard.name)) != shard.name:
        raise ShardError(f"{where} is in {other} too", "make the set again")
    if triple.meta.source not in _SOURCES[kind]:
        raise ShardError(f"{where}: source {triple.meta.source} in a {kind} set", "keep sets of different kinds apart")


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise ShardError(f"{path}: {error.strerror}, but {MANIFEST} names it", ANEW) from None


def _check_bytes(tar: BufferedReader, path: Path, entry: ShardEntry) -> None:
    """Compare size and hash, and leave the file at its start."""
    sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
    num_bytes = tar.seek(0, 2)
    tar.seek(0)
    if (num_bytes, sha256) == (entry.num_bytes, entry.sha256):
        return
    got = f"{num_bytes} bytes" if num_bytes != entry.num_bytes else f"sha256 {sha256[:12]}"
    expected = f"{entry.num_bytes} bytes" if num_bytes != entry.num_bytes else entry.sha256[:12]
    raise ShardError(f"{path}: {got}, expected {expected}; {_blamed(tar, path)}", ANEW)


def _blamed(tar: BufferedReader, path: Path) -> str:
    """Where a tar that is not the one that was written goes wrong."""
    num_read = 0
    try:
        for _ in _triples(tar, path):
            num_read += 1
    except ShardError as error:
        return f"{num_read} samples can be read, then: {error.message.removeprefix(f'{path}: ')}"
    return f"{num_read} samples can be read, but are not proven to be those that were written"


def _checked(triples: Iterator[Triple], path: Path, entry: ShardEntry) -> Iterator[Triple]:
    """Pass the samples on, and compare what they add up to with the manifest."""
    keys: set[str] = set()
    subjects: set[str] = set()
    group_counts: Counter[str] = Counter()
    for triple in triples:
        if triple.key in keys:
            raise ShardError(f"{path}: sample {triple.key} is there twice", "make the set again")
        keys.add(triple.key)
        subjects.add(triple.meta.subject)
        group_counts[triple.meta.clinical_group or UNLABELLED] += 1
        yield triple
    found = {"samples": len(keys), "subjects": sorted(subjects), "groups": dict(sorted(group_counts.items()))}
    expected = {
        "samples": entry.num_samples,
        "subjects": sorted(entry.subjects),
        "groups": dict(sorted(entry.group_counts.items())),
    }
    for name, value in expected.items():
        if found[name] != value:
            raise ShardError(f"{path}: has {name} {found[name]}, {MANIFEST} says {value}", "make the set again")


def _triples(tar: BufferedReader, path: Path) -> Iterator[Triple]:
    """The samples of a tar whose members stand together, in the order of :data:`~ccmdist.data.triple.MEMBERS`."""
    key, members = "", dict[str, bytes]()
    for name, content in _members(tar, path):
        new_key, _, ending = name.partition(".")
        if new_key != key and members:
            break
        key = new_key
        if ending not in MEMBERS:
            raise ShardError(f"{path}: sample {key}: unknown member {name!a}, expected {', '.join(MEMBERS)}", ANEW)
        before = MEMBERS[: MEMBERS.index(ending)]
        if missing := [name for name in before if name in REQUIRED and name not in members]:
            raise ShardError(f"{path}: sample {key}: {missing[0]} is missing before {ending}", ANEW)
        if misplaced := [name for name in members if name not in before]:
            raise ShardError(f"{path}: sample {key}: {ending} stands behind {misplaced[-1]}", ANEW)
        members[ending] = content
        if ending == META:
            yield triple_of(key, members, str(path))
            members = {}
    if members:
        triple_of(key, members, str(path))  # says which member is missing


def _members(tar: BufferedReader, path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a tar's members, as far as a shard may have them."""
    while (header := tar.read(_BLOCK)) != bytes(_BLOCK):
        where = f"{path}: byte {tar.tell() - len(header)}"
        info = _header(header, where)
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ShardError(f"{where}: member {info.name[:80]!a} is no plain file (type {info.type!r})", "remove it")
        check_key(info.name.partition(".")[0], where)
        if info.size > MAX_MEMBER_BYTES:
            raise ShardError(f"{where}: member {info.name} has {info.size} bytes, expected at most {MAX_MEMBER_BYTES}")
        content = tar.read(info.size)
        if len(content) != info.size:
            raise ShardError(f"{where}: the tar ends within member {info.name}", ANEW)
        tar.seek(-info.size % _BLOCK, 1)
        yield info.name, content


def _headers(tar: BufferedReader, path: Path) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar's members; after each, the tar stands where its member begins, and has to again."""
    while (header := tar.read(_BLOCK)) != bytes(_BLOCK):
        info = _header(header, f"{path}: byte {tar.tell() - len(header)}")
        yield info
        tar.seek(info.size + -info.size % _BLOCK, 1)


def _header(block: bytes, where: str) -> tarfile.TarInfo:
    if len(block) < _BLOCK:
        raise ShardError(f"{where}: the tar ends without its end mark", ANEW)
    try:
        return tarfile.TarInfo.frombuf(block, "ascii", "strict")
    except (tarfile.HeaderError, UnicodeError):
        raise ShardError(f"{where}: is not the header of a member", ANEW) from None
