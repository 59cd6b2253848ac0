"""The samples of a cache as columns of numbers, tens of bytes each where objects take hundreds; imports no torch.

Numbers take the smallest type that holds all of them. Keys and subjects are texts of hexadecimal digits that no one
compares, only tells: they lie compressed, some samples at a time.
"""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.data.cache_index import CacheEntry, Member

Column = NDArray[np.unsignedinteger]

SAMPLES_PER_BLOCK = 64
"""Whose keys are compressed together: enough to compress well, few enough to undo for one of them."""
BLOCKS_AT_ONCE = 64
NO_MEMBER = Member(0, 0, 0)
SHARD, GROUP, LENGTH = range(3)
NUM_COLUMNS = 12


class CachedSamples(Sequence[CacheEntry]):
    """An immutable sequence of entries that makes each of them when it is asked for.

    Attributes:
        shards: Names of tars, in the order in which they first occur.
        groups: Clinical groups that occur, None for samples without one.
    """

    def __init__(self, entries: Iterable[CacheEntry]) -> None:
        """Take over ``entries``, keeping no reference to any."""
        shards: dict[str, int] = {}
        groups: dict[ClinicalGroup | None, int] = {}
        parts, self._names, entries = [], list[bytes](), iter(entries)
        while some := list(islice(entries, SAMPLES_PER_BLOCK * BLOCKS_AT_ONCE)):
            numbers = np.array([_numbers(entry, shards, groups) for entry in some], dtype=np.uint64).T
            parts.append([column.astype(np.min_scalar_type(column.max())) for column in numbers])
            blocks = range(0, len(some), SAMPLES_PER_BLOCK)
            self._names += [_packed(some[first : first + SAMPLES_PER_BLOCK]) for first in blocks]
        parts = parts or [[np.empty(0, dtype=np.uint8)] * NUM_COLUMNS]
        # Joined columns have the type that holds the largest of their parts.
        self._columns: list[Column] = [np.concatenate(column) for column in zip(*parts, strict=True)]
        self.shards, self.groups = tuple(shards), tuple(groups)

    @classmethod
    def of(cls, entries: Sequence[CacheEntry]) -> "CachedSamples":
        """``entries`` themselves if they are such columns, else made of them."""
        return entries if isinstance(entries, CachedSamples) else cls(entries)

    @property
    def shard_numbers(self) -> Column:
        """Of each sample, the index into ``shards``; shape (samples,)."""
        return self._columns[SHARD]

    @property
    def group_numbers(self) -> Column:
        """Of each sample, the index into ``groups``; shape (samples,)."""
        return self._columns[GROUP]

    @property
    def num_text_tokens(self) -> Column:
        """Of each sample; shape (samples,)."""
        return self._columns[LENGTH]

    @property
    def num_bytes(self) -> int:
        """What the columns and names take."""
        return sum(column.nbytes for column in self._columns) + sum(map(len, self._names))

    def __len__(self) -> int:
        return len(self._columns[SHARD])

    @overload
    def __getitem__(self, index: int) -> CacheEntry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[CacheEntry, ...]: ...
    def __getitem__(self, index: int | slice) -> CacheEntry | tuple[CacheEntry, ...]:
        if isinstance(index, slice):
            return tuple(self[one] for one in range(len(self))[index])
        index = range(len(self))[index]  # counts negative ones from the end, refuses those that are not there
        block, place = divmod(index, SAMPLES_PER_BLOCK)
        return self._entry(index, *_unpacked(self._names[block])[place])

    def __iter__(self) -> Iterator[CacheEntry]:
        for block, packed in enumerate(self._names):
            for place, (key, subject) in enumerate(_unpacked(packed)):
                yield self._entry(block * SAMPLES_PER_BLOCK + place, key, subject)

    def _entry(self, index: int, key: str, subject: str) -> CacheEntry:
        shard, group, length, *members = (int(column[index]) for column in self._columns)
        sample, negative, text = (Member(*members[at : at + 3]) for at in range(0, 9, 3))
        about = key, self.shards[shard], self.groups[group], subject, length
        return CacheEntry(*about, sample, negative, text if text.size else None)


def _numbers(entry: CacheEntry, shards: dict[str, int], groups: dict[ClinicalGroup | None, int]) -> tuple[int, ...]:
    """All numbers of an entry; shards and groups get theirs when they first occur."""
    shard = shards.setdefault(entry.shard, len(shards))
    group = groups.setdefault(entry.clinical_group, len(groups))
    members = (entry.sample, entry.negative, entry.text or NO_MEMBER)
    numbers = (number for member in members for number in (member.offset, member.size, member.crc32))
    return (shard, group, entry.num_text_tokens, *numbers)


def _packed(entries: Sequence[CacheEntry]) -> bytes:
    return zlib.compress(json.dumps([(entry.key, entry.subject) for entry in entries]).encode(), 1)


def _unpacked(packed: bytes) -> list[tuple[str, str]]:
    names: list[tuple[str, str]] = json.loads(zlib.decompress(packed))
    return names
