"""Prompt embeddings and latents, computed once: written per shard, read back by byte ranges.

* A tar says all about itself (group and subject stand in each member's header), and its index is derived from the
  tar on the disk. So two writers of one shard do no harm: the last one to finish indexes whatever tar is there.
* Reading keeps no file open and shares no offset, so a cache may be handed to any number of worker processes.
* Embeddings that no picture decides lie in a tar once, before the first sample that has them: FLUX.1 has 4 MB of them
  for a prompt, beside 0.3 MB of latents.
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
    "image_latents",
    "mask_latents",
    "holed_latents",
    "holes",
    "layout",
)
"""Of SAMPLE besides the embeddings of its prompt; the last three in a cache with holes only."""
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
    shares_text: bool = False
    """Whether samples of one prompt have the same embeddings, which a tar then holds once."""


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

        Of a model with a second text encoder also ``pooled_prompt_embeds`` (P,). In a cache with holes also
        ``holed_latents`` (K, C, h, w), ``holes`` and ``layout`` as in EncodedSample.

        Raises:
            CacheError: If the bytes are not those that were written.
            OSError: If the file system fails, which says nothing about the cache.
        """
        text = {} if entry.text is None else self._tensors(entry, f"the text of {entry.key}", entry.text)
        return text | self._tensors(entry, f"member {entry.key}{SAMPLE}", entry.sample)

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
        what = f"member {entry.key}{NEGATIVE}" if entry.text is None else "the negative prompt"
        return self._tensors(entry, what, entry.negative)

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

    def _tensors(self, entry: CacheEntry, name: str, member: Member) -> dict[str, Tensor]:
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
        keys, written = set[str](), set[str]()
        for sample in samples:
            if sample.key in keys:
                raise CacheError(
                    f"{path}: two samples have the key {sample.key}", "give one of them another key in the source"
                )
            keys.add(sample.key)
            for name, content in _members(sample):
                if name not in written:
                    _add(tar, name, content)
                    written.add(name)
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
        if "__metadata__" in header:
            key = name.removesuffix(SAMPLE)
            about = json.loads(header["__metadata__"]["sample"])
            own, shared = (name, key + NEGATIVE), about.pop("texts", None)
            (text, of_text), (negative, _) = (contents[one] for one in shared or own)
            entry = {"key": key, "shard": shard, **about, "num_text_tokens": of_text["prompt_embeds"]["shape"][0]}
            entry |= {"sample": asdict(member), "negative": asdict(negative)}
            entries.append(entry | ({"text": asdict(text)} if shared else {}))
    tar.seek(0)
    sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
    return {"shard": shard, "num_bytes": tar.tell(), "sha256": sha256, "entries": entries}


def _members(sample: EncodedSample) -> list[tuple[str, bytes]]:
    """Name and content of all that a tar holds of a sample; texts that others have too are named by what they hold."""
    about: dict[str, Any] = {"clinical_group": sample.clinical_group, "subject": sample.subject}
    text = {"prompt_embeds": sample.prompt_embeds, "pooled_prompt_embeds": sample.pooled_prompt_embeds}
    negative = {
        "prompt_embeds": sample.negative_prompt_embeds,
        "pooled_prompt_embeds": sample.negative_pooled_prompt_embeds,
    }
    pictures = {name: getattr(sample, name) for name in TENSORS}
    name = f"{sample.key}{SAMPLE}"
    if not sample.shares_text:
        return [(name, _content(text | pictures, about)), (f"{sample.key}{NEGATIVE}", _content(negative))]
    contents = _content(text), _content(negative)
    names = [f"text-{hashlib.sha256(content).hexdigest()[:16]}{SAMPLE}" for content in contents]
    return [*zip(names, contents, strict=True), (name, _content(pictures, about | {"texts": names}))]


def _content(tensors: dict[str, Tensor | None], about: dict[str, Any] | None = None) -> bytes:
    """A safetensors file of the tensors that there are."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    # One field only: safetensors writes several in an order that changes from process to process.
    metadata = None if about is None else {"sample": json.dumps(about, sort_keys=True)}
    return safetensors.torch.save(stored, metadata=metadata)


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
