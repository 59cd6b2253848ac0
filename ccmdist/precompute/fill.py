"""Fill the cache, shard by shard: any number of workers, each may be stopped and started again at any time.

The negative prompt is encoded with each picture too, because the stock pipelines show the encoder the image beside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ccmdist.ccm.prompts import NEGATIVE_PROMPT
from ccmdist.ccm.structure import points_of_mask, structure_picture
from ccmdist.cluster.device import current_device
from ccmdist.config.data import DataSettings, PrecomputeConfig
from ccmdist.console import log, tracked
from ccmdist.data.cache_index import commit_fingerprint, flips
from ccmdist.data.given_prompts import given_prompt
from ccmdist.data.holes import holed_image, holes_of, layout_of, packed
from ccmdist.data.latent_cache import EncodedSample, write_cache_shard
from ccmdist.data.manifest import ShardEntry
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple
from ccmdist.data.views import views
from ccmdist.errors import Preempted, ShardError
from ccmdist.models.encoder_choice import load_encoders
from ccmdist.models.model_folder import ModelFolder
from ccmdist.precompute.plan import FillPlan, fill_plan

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def fill_cache(
    config: PrecomputeConfig, worker_index: int, num_workers: int, should_stop: Callable[[], bool] = lambda: False
) -> Path:
    """Encode every shard of this worker that is not committed yet; the folder of the cache.

    Args:
        config: Which shards, which encoders.
        worker_index: This worker takes the shards ``worker_index::num_workers``.
        num_workers: Workers that share the shards without talking to each other.
        should_stop: Asked between shards.

    Raises:
        Preempted: If ``should_stop`` said so while there was work left; what was encoded is committed.
        ShardError: If a source shard is damaged, a frame is not square, one that is to get the next group's prompt
            has no group, or one that is to teach how holes are filled hides something itself.
        ModelError: If the model folder is not complete.
        ConfigError: If a prompt is longer than a text encoder takes, or the VAE does not divide the images.
    """
    model = ModelFolder.open(config.data.model)
    plan = fill_plan(config, model, worker_index, num_workers)
    commit_fingerprint(plan.folder, plan.fingerprint)
    num_open = len(plan.open_shards)
    log.info("%s: %d of this worker's %d shards are to be encoded", plan.folder, num_open, len(plan.shards))
    if num_open:
        encoders = Encoders(model, config.data, config.batch_size)
        for done, shard in enumerate(tracked(plan.open_shards, "shards", num_open)):
            if should_stop():
                raise Preempted(
                    f"precompute: stopped with {done} of {num_open} shards encoded and committed",
                    "run the same command again",
                )
            write_cache_shard(plan.folder, shard.name, encoders.encoded(shard))
    _tell(plan)
    return plan.folder


def _tell(plan: FillPlan) -> None:
    num_committed, num_shards = plan.num_committed, len(plan.all_shards)
    if num_committed == num_shards:
        log.info("%s: complete, %d shards", plan.folder, num_shards)
    else:
        told = "%s: %d of %d shards are committed; other workers encode the rest, or the same command run again"
        log.info(told, plan.folder, num_committed, num_shards)


class Encoders:
    """Both encoders, and how a shard goes through them."""

    def __init__(self, model: ModelFolder, data: DataSettings, batch_size: int) -> None:
        self.data, self.batch_size = data, batch_size
        dtype = DTYPES[data.dtype]
        device = current_device()
        self.prompts, self.codec = load_encoders(model, dtype, device)

    def encoded(self, shard: ShardEntry) -> Iterator[EncodedSample]:
        """The samples of a source shard and, of train, their flipped views."""
        where = str(self.data.shards / shard.name)
        wanted = flips(self.data) if shard.split == "train" else []
        triples = (self._checked(triple, shard, where) for triple in read_shard(self.data.shards, shard))
        frames = chain.from_iterable(views(triple, self.data.image_size_px, wanted, where) for triple in triples)
        for triples_together in _batched(frames, self.batch_size):
            yield from self._encoded(triples_together, where)

    def _checked(self, triple: Triple, shard: ShardEntry, where: str) -> Triple:
        """The sample as its shard has it, with a map of points where one is to be drawn.

        A graph of a mask is not that of its mirror image to the pixel: one map for all views of a sample.
        """
        if self.data.holes and triple.inpaint_mask is not None and shard.split == "train":
            raise ShardError(
                f"{where}: sample {triple.key} of train has an inpaint_mask of its own: what it hides is unknown and "
                "cannot teach a model to fill holes",
                "pack it with `ccmdist shards folders`, which keeps such people out of train, or leave out data.holes",
            )
        if self.data.structure != "mask" and triple.points is None:
            return replace(triple, points=points_of_mask(triple.nerve_mask))
        return triple

    def _encoded(self, triples: list[Triple], where: str) -> Iterator[EncodedSample]:
        pictures = [structure_picture(one.nerve_mask, one.points, self.data.structure) for one in triples]
        prompts = [given_prompt(one.meta, self.data.prompts, f"{where}: sample {one.key}") for one in triples]
        negatives = [NEGATIVE_PROMPT] * len(triples)
        positive, negative = self.prompts.encode(prompts, pictures), self.prompts.encode(negatives, pictures)
        pooled = zip(self.prompts.pooled(prompts), self.prompts.pooled(negatives), strict=True)
        images = self.codec.encode(np.stack([triple.image for triple in triples]))
        structures = self.codec.encode_structure(np.stack(pictures))
        holed = [self._holed(*one) for one in zip(triples, pictures, strict=True)]
        encoded = zip(positive, negative, images, structures, strict=True)
        for triple, tensors, with_holes, (whole, whole_negative) in zip(triples, encoded, holed, pooled, strict=True):
            yield EncodedSample(
                triple.key,
                triple.meta.clinical_group,
                triple.meta.subject,
                *tensors,
                **with_holes,
                pooled_prompt_embeds=whole,
                negative_pooled_prompt_embeds=whole_negative,
                shares_text=not self.prompts.sees_pictures,
            )

    def _holed(self, triple: Triple, picture: np.ndarray) -> dict[str, Tensor]:
        """What a cache with holes holds of a sample besides; its images with holes are encoded together."""
        if self.data.holes is None:
            return {}
        holes = holes_of(triple, self.data.holes, self.data.image_size_px)
        images = holed_image(triple.image, holes)
        # Not more at once than asked for, however many holes a sample has.
        parts = [self.codec.encode(images[at : at + self.batch_size]) for at in range(0, len(images), self.batch_size)]
        return {
            "holed_latents": torch.cat(parts),
            "holes": torch.from_numpy(packed(holes)),
            "layout": torch.from_numpy(layout_of(picture)),
        }


def _batched(triples: Iterator[Triple], size: int) -> Iterator[list[Triple]]:
    while some := list(islice(triples, size)):
        yield some
