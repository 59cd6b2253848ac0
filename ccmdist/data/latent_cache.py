"""Prompt embeddings and latents, computed once: written per shard, read back by byte ranges.

* A tar says all about itself (group and subject stand in each member's header), and its index is derived from the
  tar on the disk. So two writers of one shard do no harm: the last one to finish indexes whatever tar is there.
* Reading keeps no file open and shares no offset, so a cache may be handed to any number of worker processes.
* Each read compares a checksum: damage is told with shard and key instead of being trained on.

Shapes: L text tokens, D text width, C latent channels, H W pixels, h w = H/8 W/8, K holes.
"""

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.commit import commit_json, committed_file, sha256_of_file
from ccmdist.config.data import DataSettings, Split
from ccmdist.data.cache_index import (
    CacheEntry,
    Member,
    ShardIndex,
    cache_folder,
    command,
    find_cache,
    fingerprint,
    index_path,
    indexes,
    read_index,
)
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.manifest import read_manifest
from ccmdist.errors import OF_THE_MACHINE, CacheError

__all__ = ["CacheEntry", "EncodedSample", "LatentCache", "cache_folder", "fingerprint", "write_cache_shard"]

SAMPLE, NEGATIVE = ".safetensors", ".negative.safetensors"
TENSORS = (
    "prompt_embeds",
    "pooled_prompt_embeds",
    "image_latents",
    "mask_latents",
    "holed_latents",
    "holes",
    "layout",
)
"""Of SAMPLE; the last three in a cache with holes only, the second of models with a second text encoder."""
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class EncodedSample:
    """What the encoders made of one sample or view."""

    key: str
    clinical_group: ClinicalGroup | None
    subject: str
    prompt_embeds: Tensor
    """(L, D), without padding."""
    negative_prompt_embeds: Tensor
    """(L, D) of the negative prompt with the same mask."""
    image_latents: Tensor
    """(C, h, w), normalised."""
    mask_latents: Tensor
    """(C, h, w), normalised, of the picture that stands for the nerves."""
    holed_latents: Tensor | None = None
    """(K, C, h, w), normalised, of the image without what each hole hides. This and the next two: only with holes."""
    holes: Tensor | None = None
    """uint8 (K, H, ceil(W/8)), see :func:`ccmdist.data.holes.packed`."""
    layout: Tensor | None = None
    """uint8 (H/16, W/16), see :func:`ccmdist.data.holes.layout_of`."""
    pooled_prompt_embeds: Tensor | None = None
    """(P,) of a second text encoder, which sees no picture. This and the next: only of models that have one."""
    negative_pooled_prompt_embeds: Tensor | None = None
    """(P,) of the negative prompt."""


@dataclass(frozen=True)
class _Tar:
    """What an index says of its tar as a whole."""

    name: str
    num_bytes: int
    sha256: str


class LatentCache:
    """The committed shards of one cache, for reading.

    Attributes:
        folder: Where it lies.
        digest: Identity of its contents.
    """

    def __init__(
        self, folder: Path, digest: str, data: DataSettings, samples: dict[Split, CachedSamples], tars: list[_Tar]
    ) -> None:
        self.folder, self.digest, self.data = folder, digest, data
        self._samples, self._tars = samples, tars

    @classmethod
    def open(cls, data: DataSettings, encoders: dict[str, Any], splits: Sequence[Split] = SPLITS) -> "LatentCache":
        """The cache of ``data``, with the splits that will be read.

        Args:
            data: The settings that name the cache.
            encoders: Identity of the encoders, as the model folder gives it.
            splits: Of which every shard must be there.

        Raises:
            CacheError: If no cache fits, shards are missing, or one does not have the size that its index states.
            ShardError: If the manifest of the shard set cannot be read.
        """
        manifest = read_manifest(data.shards)
        folder, digest = find_cache(data, manifest.digest, encoders)
        found = indexes(folder, [shard for split in splits for shard in manifest.of_split(split)], data)
        tars: list[_Tar] = []
        samples = {split: CachedSamples(_noted(found, len(manifest.of_split(split)), tars)) for split in splits}
        return cls(folder, digest, data, samples, tars)

    def entries(self, split: Split) -> CachedSamples:
        """The samples of a split: shard by shard, each followed by its flipped views."""
        return self._samples[split]

    def read(self, entry: CacheEntry) -> dict[str, Tensor]:
        """``prompt_embeds`` (L, D), ``image_latents`` and ``mask_latents`` (C, h, w), in the dtype of the cache.

        In a cache with holes also ``holed_latents`` (K, C, h, w), ``holes`` and ``layout`` as in EncodedSample.

        Raises:
            CacheError: If the bytes are not those that were written.
            OSError: If the file system fails, which says nothing about the cache.
        """
        return self._tensors(entry, SAMPLE, entry.sample)

    def read_negative(self, entry: CacheEntry) -> Tensor:
        """Embeddings (L, D) of the negative prompt with the sample's mask, in the dtype of the cache.

        Raises:
            CacheError: If the bytes are not those that were written.
        """
        return self.read_negatives(entry)["prompt_embeds"]

    def read_negatives(self, entry: CacheEntry) -> dict[str, Tensor]:
        """All that text encoders made of the negative prompt, by the names that it has for the prompt.

        Raises:
            CacheError: If the bytes are not those that were written.
        """
        return self._tensors(entry, NEGATIVE, entry.negative)

    def verify(self) -> str:
        """Read everything once; how much there is.

        Raises:
            CacheError: If a tar is not the one that was written; names the damaged samples.
        """
        for tar in self._tars:
            if sha256_of_file(self.folder / tar.name) != tar.sha256:
                for entry in read_index(self.folder, tar.name).entries:
                    self.read(entry)
                    self.read_negative(entry)
                raise self._damaged(tar.name, "differs from its index between the samples")
        num_samples, num_bytes = sum(map(len, self._samples.values())), sum(tar.num_bytes for tar in self._tars)
        return f"{self.folder}: {len(self._tars)} shards, {num_samples} samples, {num_bytes} bytes, all intact"

    def _tensors(self, entry: CacheEntry, ending: str, member: Member) -> dict[str, Tensor]:
        name = f"member {entry.key}{ending}"
        try:
            data = _read_range(self.folder / entry.shard, member)
        except OSError as error:
            if error.errno in OF_THE_MACHINE:
                raise
            raise self._damaged(entry.shard, f"{name} cannot be read ({error.strerror})") from None
        if zlib.crc32(data) != member.crc32:
            raise self._damaged(entry.shard, f"{name} is damaged")
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            raise self._damaged(entry.shard, f"{name} is not what it should be ({error})") from None

    def _damaged(self, shard: str, problem: str) -> CacheError:
        path = self.folder / shard
        return CacheError(
            f"{path}: {problem}", f"remove {index_path(self.folder, shard)} and run `{command(self.data)}`"
        )


def _noted(indexes: Iterator[ShardIndex], count: int, tars: list[_Tar]) -> Iterator[CacheEntry]:
    """The entries of the next ``count`` indexes, whose tars are added to ``tars``."""
    for index in islice(indexes, count):
        tars.append(_Tar(index.shard, index.num_bytes, index.sha256))
        yield from index.entries


def write_cache_shard(folder: Path, shard: str, samples: Iterable[EncodedSample]) -> None:
    """Commit one tar of a cache, then its index. Equal samples give equal bytes.

    Args:
        folder: Of the cache.
        shard: Name of the tar, the same as that of its source.
        samples: In the order of the source.

    Raises:
        CacheError: If two samples have one key, such as a sample named like the flipped view of another.
    """
    path = folder / shard
    with committed_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        keys: set[str] = set()
        for sample in samples:
            if sample.key in keys:
                raise CacheError(
                    f"{path}: two samples have the key {sample.key}", "give one of them another key in the source"
                )
            keys.add(sample.key)
            _add(tar, f"{sample.key}{SAMPLE}", _sample_bytes(sample))
            _add(tar, f"{sample.key}{NEGATIVE}", _negative_bytes(sample))
    _commit_index(path)


def _commit_index(path: Path) -> None:
    """Index the tar at ``path``, and again if another writer has replaced it meanwhile."""
    while True:
        with path.open("rb") as tar:
            commit_json(index_path(path.parent, path.name), _index_of(tar, path.name))
            if os.fstat(tar.fileno()).st_ino == path.stat().st_ino:
                return


def _index_of(tar: io.BufferedReader, shard: str) -> dict[str, Any]:
    contents: dict[str, tuple[Member, dict[str, Any]]] = {}
    with tarfile.open(fileobj=tar, mode="r:") as archive:
        for info in archive:
            data = archive.extractfile(info)
            assert data is not None, "a cached tar holds files only"
            content = data.read()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            contents[info.name] = Member(info.offset_data, info.size, zlib.crc32(content)), header
    entries = []
    for name, (member, header) in contents.items():
        if not name.endswith(NEGATIVE):
            key = name.removesuffix(SAMPLE)
            about = json.loads(header["__metadata__"]["sample"])
            num_text_tokens = header["prompt_embeds"]["shape"][0]
            negative = contents[key + NEGATIVE][0]
            entries.append(
                asdict(
                    CacheEntry(key, shard, **about, num_text_tokens=num_text_tokens, sample=member, negative=negative)
                )
            )
    tar.seek(0)
    sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
    return {"shard": shard, "num_bytes": tar.tell(), "sha256": sha256, "entries": entries}


def _sample_bytes(sample: EncodedSample) -> bytes:
    found = {name: getattr(sample, name) for name in TENSORS}
    tensors = {name: _stored(tensor) for name, tensor in found.items() if tensor is not None}
    about = {"clinical_group": sample.clinical_group, "subject": sample.subject}
    # One field only: safetensors writes several in an order that changes from process to process.
    return safetensors.torch.save(tensors, metadata={"sample": json.dumps(about, sort_keys=True)})


def _negative_bytes(sample: EncodedSample) -> bytes:
    found = {
        "prompt_embeds": sample.negative_prompt_embeds,
        "pooled_prompt_embeds": sample.negative_pooled_prompt_embeds,
    }
    return safetensors.torch.save({name: _stored(tensor) for name, tensor in found.items() if tensor is not None})


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _read_range(path: Path, member: Member) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, member.size, member.offset)
    finally:
        os.close(descriptor)
