"""Samples of a shard set one by one, in any order, without a cache: for what sees pixels; imports no torch.

Each tar is read once, compared with the manifest, and noted down; later a sample is one read of a stretch of it, whose
checksum is compared.
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

from ccmdist.config.data import DataSettings, Split
from ccmdist.data.cache_index import CacheEntry, Member, flips
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.manifest import SPLITS, ShardEntry, read_manifest
from ccmdist.data.reader import ANEW, read_places, sample_in
from ccmdist.data.triple import Triple
from ccmdist.data.views import views
from ccmdist.errors import OF_THE_MACHINE, ShardError

NOWHERE = Member(0, 0, 0)


class ShardSamples:
    """The samples of a shard set at the size of a run and, of train, their flipped views.

    Attributes:
        digest: Of the set's manifest.
        um_per_px: Key of each sample and view -> micrometres per pixel at the size of the run.
    """

    def __init__(self, data: DataSettings, splits: Sequence[Split] = SPLITS) -> None:
        """Look through the tars of ``splits``.

        Raises:
            ShardError: If a tar is not the one that the manifest names.
        """
        manifest = read_manifest(data.shards)
        self.data, self.digest = data, manifest.digest
        self.um_per_px: dict[str, float] = {}
        self._entries = {
            split: CachedSamples(entry for shard in manifest.of_split(split) for entry in self._entries_of(shard))
            for split in splits
        }

    def entries(self, split: Split) -> CachedSamples:
        """The samples of a split, shard by shard, each followed by its flipped views; all of text length 0."""
        return self._entries[split]

    def triple(self, entry: CacheEntry) -> Triple:
        """A sample, or flipped view of one, as the run sees it.

        Raises:
            ShardError: If the bytes are not those that were there when the set was opened.
            OSError: If the file system fails, which says nothing about the shard.
        """
        path, place = self.data.shards / entry.shard, entry.sample
        try:
            with path.open("rb") as tar:
                tar.seek(place.offset)
                data = tar.read(place.size)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
                raise
            raise ShardError(f"{path}: sample {entry.key} cannot be read ({error.strerror})", ANEW) from None
        if zlib.crc32(data) != place.crc32:
            raise ShardError(f"{path}: sample {entry.key} has changed since the run began", ANEW)
        triple = sample_in(data, path)
        wanted = [flip for flip in flips(self.data) if entry.key == f"{triple.key}-{flip}"]
        scaled = replace(triple, meta=replace(triple.meta, um_per_px=self.um_per_px[entry.key]))
        *_, view = views(scaled, self.data.image_size_px, wanted, str(path))
        return view

    def _entries_of(self, shard: ShardEntry) -> list[CacheEntry]:
        found = []
        for triple, start, data in read_places(self.data.shards, shard):
            place = Member(start, len(data), zlib.crc32(data))
            names = [triple.key, *(f"{triple.key}-{flip}" for flip in flips(self.data) if shard.split == "train")]
            for key in names:
                self.um_per_px[key] = scaled_um_per_px(triple, self.data.image_size_px)
                found.append(
                    CacheEntry(key, shard.name, triple.meta.clinical_group, triple.meta.subject, 0, place, NOWHERE)
                )
        return found


def scaled_um_per_px(triple: Triple, size_px: int) -> float:
    """Micrometres per pixel of a square frame that is brought to ``size_px``."""
    return triple.meta.um_per_px * triple.image.shape[0] / size_px
