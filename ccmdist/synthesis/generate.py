"""Draw the batches of a plan: mask and prompt, from the cache, to image.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, h w latent rows and columns.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccmdist.adapters.state import AdapterState
from ccmdist.cluster.device import current_device
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log, tracked
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.given_prompts import given_prompt
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.shard_samples import scaled_um_per_px
from ccmdist.data.trained_on import training_of
from ccmdist.data.triple import Triple, mask_sha256
from ccmdist.data.views import views
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import sample
from ccmdist.errors import AdapterError, Preempted, RunError
from ccmdist.models import attention
from ccmdist.models.compiling import compiled_block_pass
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_state import NetworkState
from ccmdist.models.sampling import GuidedVelocity, block_pass
from ccmdist.models.staging import staged
from ccmdist.precompute.fill import DTYPES
from ccmdist.synthesis import base
from ccmdist.synthesis.networks import NetworkDrawing
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import UNTUNED, Plan, Request, base_of, make_plan
from ccmdist.synthesis.sampler import Sampler, noise_of, refuse_non_finite

NUM_SHARDS_REMEMBERED = 2
S_PER_HOUR = 3600
REMEDY = "check the adapter with `ccmdist adapter verify`; lower guidance_scale, or use data.dtype=fp32"


def synthesize(
    config: SynthesizeConfig,
    weights: AdapterState | NetworkState | None,
    worker_index: int = 0,
    num_workers: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Draw batches until no open one is left that nobody else draws; whether the set is complete with that.

    A batch that another worker draws at the end is left to it, or to whoever is started in its place should it die.

    Args:
        config: Which masks, how many images, which sampler.
        weights: An adapter that is merged into the model, or None for the untuned model; or a network that was trained
            from scratch.
        worker_index: This worker begins with the batches ``worker_index::num_workers`` of the plan.
        num_workers: Workers that share the batches without talking to each other.
        should_stop: Asked between batches.

    Raises:
        Preempted: If ``should_stop`` said so while there was work left; what was drawn is committed.
        AdapterError: If the adapter was trained on another base.
        ModelError: If the network draws images of another size, or was trained on the latents of another VAE.
        RunError: If the folder holds a set with another plan, the card cannot hold its base, or an image is not
            finite.
    """
    drawing = NetworkDrawing(config, weights) if isinstance(weights, NetworkState) else _EditDrawing(config, weights)
    output = drawing.begin()
    plan = output.plan
    mine = output.open_batches(worker_index, num_workers)
    log.info("%s: %d of %d batches are this worker's and to be drawn", config.out, len(mine), len(plan.batches))
    # To load the model takes minutes, in which no batch is claimed.
    if any(map(output.is_free, [*mine, *output.open_for_help(worker_index, num_workers)])):
        sampler, entries = drawing.open(plan)
        worker = Worker(config, output, sampler, Sources(config, entries), should_stop)
        worker.draw(mine)
        while worker.draw(output.open_for_help(worker_index, num_workers)):
            log.info("%s: looking for batches that others have left meanwhile", config.out)
    return _told(output, output.finish())


class _EditDrawing:
    """A set that Qwen-Image-Edit draws, with an adapter or without one."""

    def __init__(self, config: SynthesizeConfig, adapter: AdapterState | None) -> None:
        self.config, self.adapter = config, adapter
        self.model = ModelFolder.open(config.data.model)
        self.encoders = self.model.encoder_identity()

    def begin(self) -> SyntheticSet:
        """The set, its plan accepted and fit to be drawn on this process's card."""
        config, model, adapter = self.config, self.model, self.adapter
        form = base_of(config)
        digest = adapter_digest(adapter) if adapter else UNTUNED
        chosen = form or base.base_for_card(model, config.data.dtype, adapter)
        plan = make_plan(config, model, self.encoders, digest, chosen)
        if adapter is not None:
            # Before the plan is written: one with an adapter that does not fit would stand in the way of the right one.
            _refuse_another_base(adapter, plan, config)
        base.refuse_small_card(config.out, model, plan.settings, adapter)
        training = training_of(adapter.facts if adapter else None, read_manifest(config.data.shards))
        output = SyntheticSet(config.out, plan, training)
        try:
            output.accept()
        except RunError:
            # Another worker, on another card, may have begun the set meanwhile.
            if form is not None or base_of(config) in (None, plan.settings.base):
                raise
            return self.begin()
        return output

    def open(self, plan: Plan) -> tuple[Sampler, CachedSamples]:
        """The model, loaded, and the samples that are drawn from."""
        cache = LatentCache.open(self.config.data, self.encoders, (self.config.split,))
        model = staged(self.model, plan.settings.base_digest) if self.config.data.stage_model else self.model
        return ImageSampler(plan, model, cache, self.adapter), cache.entries(self.config.split)


def adapter_digest(adapter: AdapterState) -> str:
    """Identity of what an adapter does to its base, wherever it lies: its kind, its scale and its tensors."""
    digest = hashlib.sha256(f"{adapter.settings.kind}/{adapter.scale!r}".encode())
    for name, tensors in sorted(adapter.tensors.items()):
        for kind, tensor in sorted(tensors.items()):
            digest.update(f"{name}.{kind}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Sources:
    """Masks and prompts of the source set, as the encoders saw them; remembers the shards that were read last."""

    def __init__(self, config: SynthesizeConfig, entries: Iterable[CacheEntry]) -> None:
        """Read nothing but the manifest yet."""
        self._data, self._split = config.data, config.split
        self._places = {entry.key: entry.shard for entry in entries}
        self._shards = {shard.name: shard for shard in read_manifest(config.data.shards).of_split(config.split)}
        self._of_shard = lru_cache(maxsize=NUM_SHARDS_REMEMBERED)(self._read)

    def triple(self, key: str) -> Triple:
        """A sample, or flipped view of one, at the size of the run."""
        return self._of_shard(self._places[key])[key]

    def _read(self, name: str) -> dict[str, Triple]:
        folder, size_px = self._data.shards, self._data.image_size_px
        flips = self._data.flips if self._split == "train" else ()
        found: dict[str, Triple] = {}
        for triple in read_shard(folder, self._shards[name]):
            scaled = replace(triple, meta=replace(triple.meta, um_per_px=scaled_um_per_px(triple, size_px)))
            found |= {view.key: view for view in views(scaled, size_px, flips, str(folder / name))}
        return found


class ImageSampler:
    """The model with its adapter merged, and how the requests of a batch go through it."""

    def __init__(self, plan: Plan, model: ModelFolder, cache: LatentCache, adapter: AdapterState | None) -> None:
        """Load the MMDiT and the VAE, whole, onto this process's device. Encoders of prompts are not needed."""
        settings = plan.settings
        self.device = current_device()
        self.dtype = DTYPES[settings.dtype]
        self.model = base.load(model, settings, adapter, self.device)
        attention.set_backend(self.model, self.device, self.dtype)
        self.run_block = compiled_block_pass(self.device) if settings.compile_blocks else block_pass
        self.codec = LatentCodec.load(model, self.dtype, self.device)
        self.cache = cache
        self.entries: dict[str, CacheEntry] = {entry.key: entry for entry in cache.entries(settings.split)}
        self.seed, self.guidance_scale = settings.seed, settings.guidance_scale
        self.token_hw = 2 * (settings.image_size_px // PX_PER_TOKEN,)
        self.sigmas = base.noise_levels(model, settings)

    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W), of requests with one text length.

        Raises:
            RunError: If an image is not finite; names the request.
            CacheError: If a cached sample is damaged.
        """
        entries = [self.entries[request.source_key] for request in requests]
        samples = [self.cache.read(entry) for entry in entries]
        mask_latents_BSC = self._placed(flow.pack_latents(torch.stack([s["mask_latents"] for s in samples])))
        embeds = [self._placed(torch.stack([s["prompt_embeds"] for s in samples]))]
        if self.guidance_scale > 1:
            embeds.append(self._placed(torch.stack([self.cache.read_negative(entry) for entry in entries])))
        predict = GuidedVelocity(self.model, mask_latents_BSC, embeds, self.token_hw, self.token_hw, self.run_block)

        def velocity(latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
            return predict(self._placed(latents_BSC), sigma_B)

        noise_BSC = torch.stack([noise_of(self.seed, request, mask_latents_BSC.shape[1:]) for request in requests])
        latents_BSC = sample(velocity, noise_BSC.to(self.device), self.sigmas, self.guidance_scale)
        refuse_non_finite(latents_BSC, requests, REMEDY)
        latents_hw = (2 * self.token_hw[0], 2 * self.token_hw[1])
        return self.codec.decode(flow.unpack_latents(latents_BSC, *latents_hw))

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.dtype)


class Worker:
    """One of the workers of a set: a model, and what it draws with it.

    Args:
        config: How often to tell how far it is.
        output: The set.
        sampler: Draws.
        sources: What is drawn from.
        should_stop: Asked before each batch that is to be drawn.
    """

    def __init__(
        self,
        config: SynthesizeConfig,
        output: SyntheticSet,
        sampler: Sampler,
        sources: Sources,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.output, self.sampler, self.sources = config, output, sampler, sources
        self.should_stop = should_stop
        self.start, self.num_batches, self.num_images = time.monotonic(), 0, 0

    def draw(self, batches: Sequence[int]) -> int:
        """Draw and commit those of the batches that are open and that nobody else draws; how many that were.

        Raises:
            Preempted: If ``should_stop`` said so while there was work left.
        """
        before = self.num_batches
        for batch in tracked(batches, "batches", len(batches)):
            with self.output.claim(batch) as is_mine:
                if is_mine:
                    self._refuse_to_go_on()
                    self._draw(batch)
        return self.num_batches - before

    def _refuse_to_go_on(self) -> None:
        if self.should_stop():
            raise Preempted(
                f"synthesize: stopped with {self.output.num_committed()} of {len(self.output.plan.batches)} batches "
                "drawn and committed",
                "run the same command again",
            )

    def _draw(self, batch: int) -> None:
        requests = self.output.plan.batches[batch].requests
        images = self.sampler.draw(requests)
        self.output.commit_batch(batch, _triples(self.output.plan, batch, images, self.sources))
        self.num_batches, self.num_images = self.num_batches + 1, self.num_images + len(requests)
        if self.num_batches % self.config.log_every_batches == 0:
            per_hour = self.num_images * S_PER_HOUR / max(time.monotonic() - self.start, 1e-9)
            log.info("batch %d: %d images drawn by this worker, %.0f per hour", batch, self.num_images, per_hour)


def _triples(plan: Plan, batch: int, images_BHW: NDArray[np.uint8], sources: Sources) -> Iterator[Triple]:
    """The samples of a batch, with all that is known about their origin."""
    for request, image in zip(plan.batches[batch].requests, images_BHW, strict=True):
        source = sources.triple(request.source_key)
        about: dict[str, Any] = plan.provenance(batch, request, mask_sha256(source.nerve_mask))
        # What a phantom was constructed with does not hold for what a model draws.
        prompt = given_prompt(source.meta, plan.settings.prompts, f"sample {source.key}")
        meta = replace(source.meta, prompt=prompt, source="synthetic", labels={}, provenance=about)
        yield replace(source, key=request.key, image=image, meta=meta)


def _refuse_another_base(adapter: AdapterState, plan: Plan, config: SynthesizeConfig) -> None:
    trained_on, base = adapter.facts.get("base_digest", "(not known)"), plan.settings.base_digest
    if trained_on != base:
        raise AdapterError(
            f"{config.adapter}: was trained on the base {trained_on[:12]}, {config.data.model} holds {base[:12]}",
            "set data.model to the model that the adapter was trained on",
        )


def _told(output: SyntheticSet, is_complete: bool) -> bool:
    if is_complete:
        log.info("%s: complete, %d images in %d shards", output.folder, output.plan.num_images, output.plan.num_shards)
    else:
        log.info(
            "%s: %d of %d batches are committed; other workers draw the rest, or the same command run again",
            output.folder,
            output.num_committed(),
            len(output.plan.batches),
        )
    return is_complete
