"""What a set is drawn from: masks, prompts and frames of the source set, as the encoders saw them."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ccmdist.config.data import Flip, HoleSettings, Split
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_keys, read_shard
from ccmdist.data.shard_samples import scaled_um_per_px
from ccmdist.data.triple import Triple
from ccmdist.data.views import FLIPS, views
from ccmdist.synthesis.plan import Plan
from ccmdist.synthesis.requests import Request

NUM_SHARDS_REMEMBERED: Final = 2


class Sources:
    """The samples of a split and flipped views of them, at the size of the run; remembers the shards read last.

    Args:
        folder: Of the source set.
        split: Whose samples they are.
        size_px: Edge of the images of the run.
        flips: Views that were drawn from too.
        places: Name of the shard of each key.
        holes: How holes are cut, where some are filled.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        size_px: int,
        flips: Iterable[Flip],
        places: Mapping[str, str],
        holes: HoleSettings | None,
    ) -> None:
        self._folder, self._size_px, self._flips, self._holes = folder, size_px, tuple(flips), holes
        self._places, self._is_told = places, False
        self._shards = {shard.name: shard for shard in read_manifest(folder).of_split(split)}
        self._of_shard = lru_cache(maxsize=NUM_SHARDS_REMEMBERED)(self._read)

    @classmethod
    def of_run(cls, config: SynthesizeConfig, plan: Plan, entries: Iterable[CacheEntry]) -> "Sources":
        """What the settings draw from; reads nothing but the manifest yet."""
        data = config.data
        flips = data.flips if config.split == "train" else ()
        places = {entry.key: entry.shard for entry in entries}
        return cls(data.shards, config.split, data.image_size_px, flips, places, plan.settings.holes)

    @classmethod
    def of_plan(cls, folder: Path, plan: Plan) -> "Sources":
        """What a plan has drawn from, found in ``folder`` by the headers of its tars."""
        settings, places = plan.settings, dict[str, str]()
        for shard in read_manifest(folder).of_split(settings.split):
            for key in read_keys(folder, shard):
                places |= dict.fromkeys((key, *(f"{key}-{flip}" for flip in FLIPS)), shard.name)
        wanted = {request.source_key.rpartition("-")[2] for batch in plan.batches for request in batch.requests}
        flips: list[Flip] = [flip for flip in ("hflip", "vflip", "rot180") if flip in wanted]
        return cls(folder, settings.split, settings.image_size_px, flips, places, settings.holes)

    def triple(self, key: str) -> Triple:
        """A sample, or flipped view of one, at the size of the run."""
        return self._of_shard(self._places[key])[key]

    def hole(self, request: Request) -> NDArray[np.bool_] | None:
        """What is filled of the source of a request, (H, W); None where a whole image is drawn."""
        if request.hole is None:
            return None
        from ccmdist.data.holes import holes_of  # which takes torch

        assert self._holes is not None, "a plan that fills holes says how they are cut"
        hole: NDArray[np.bool_] = holes_of(self.triple(request.source_key), self._holes, self._size_px)[request.hole]
        return hole

    def _read(self, name: str) -> dict[str, Triple]:
        found: dict[str, Triple] = {}
        for triple in read_shard(self._folder, self._shards[name]):
            self._tell_size(triple)
            scaled = replace(triple, meta=replace(triple.meta, um_per_px=scaled_um_per_px(triple, self._size_px)))
            where = str(self._folder / name)
            found |= {view.key: view for view in views(scaled, self._size_px, self._flips, where)}
        return found

    def _tell_size(self, triple: Triple) -> None:
        """Say once that frames are not kept as they are, where that matters."""
        edge_px = triple.image.shape[0]
        if self._holes is not None and edge_px != self._size_px and not self._is_told:
            self._is_told = True
            log.info(
                "%s: frames of %d px are resized to the %d px of the run; outside of its hole, an image has the bytes "
                "of the resized frame",
                self._folder,
                edge_px,
                self._size_px,
            )
