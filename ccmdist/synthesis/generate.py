"""Draw the batches of a plan: mask and prompt, from the cache, to image; or an image with a hole to one without.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, h w latent rows and columns,
H W rows and columns.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccmdist.adapters.state import AdapterState
from ccmdist.cluster.device import current_device
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.objectives.objective import AdapterName
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log, tracked
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.given_prompts import given_prompt
from ccmdist.data.holes import hole_tokens, unpacked
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.manifest import read_manifest
from ccmdist.data.trained_on import training_of
from ccmdist.data.triple import Triple, mask_sha256
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import Known, sample
from ccmdist.errors import AdapterError, Preempted, RunError
from ccmdist.models import attention
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.compiling import compiled_block_pass
from ccmdist.models.encoder_choice import load_codec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_state import NetworkState
from ccmdist.models.sampling import block_pass
from ccmdist.models.staging import staged
from ccmdist.precompute.fill import DTYPES
from ccmdist.synthesis import base
from ccmdist.synthesis.networks import NetworkDrawing
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import NF4, Plan
from ccmdist.synthesis.planning import UNTUNED, base_of, base_of_adapters, make_plan
from ccmdist.synthesis.requests import Request
from ccmdist.synthesis.sampler import Sampler, noise_of, refuse_non_finite
from ccmdist.synthesis.sources import Sources
from ccmdist.synthesis.trained_for import refuse_another_structure

Adapters = Mapping[AdapterName, AdapterState]
"""What draws for each objective; none of the untuned model."""
S_PER_HOUR = 3600
REMEDY = "check the adapter with `ccmdist adapter verify`; lower guidance_scale, or use data.dtype=fp32"


def synthesize(
    config: SynthesizeConfig,
    weights: Adapters | AdapterState | NetworkState | None,
    worker_index: int = 0,
    num_workers: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Draw batches until no open one is left that nobody else draws; whether the set is complete with that.

    A batch that another worker draws at the end is left to it, or to whoever is started in its place should it die.

    Args:
        config: Which masks, how many images, which sampler.
        weights: An adapter that is merged into the model, one for each objective, or None for the untuned model; or a
            network that was trained from scratch.
        worker_index: This worker begins with the batches ``worker_index::num_workers`` of the plan.
        num_workers: Workers that share the batches without talking to each other.
        should_stop: Asked between batches.

    Raises:
        Preempted: If ``should_stop`` said so while there was work left; what was drawn is committed.
        AdapterError: If an adapter was trained on another base, or for another objective.
        ConfigError: If in training something else stood for the nerves.
        ModelError: If the network draws images of another size, or was trained on the latents of another VAE.
        RunError: If the folder holds a set with another plan, the card cannot hold its base, or an image is not
            finite.
    """
    drawing = NetworkDrawing(config, weights) if isinstance(weights, NetworkState) else _edit_drawing(config, weights)
    output = drawing.begin()
    plan = output.plan
    mine = output.open_batches(worker_index, num_workers)
    log.info("%s: %d of %d batches are this worker's and to be drawn", config.out, len(mine), len(plan.batches))
    # To load the model takes minutes, in which no batch is claimed.
    first = next(filter(output.is_free, [*mine, *output.open_for_help(worker_index, num_workers)]), None)
    if first is not None:
        objective = plan.batches[first].objective
        sampler, entries = drawing.open(plan, objective)
        worker = Worker(config, output, sampler, Sources.of_run(config, plan, entries), should_stop, objective)
        worker.draw(mine)
        while worker.draw(output.open_for_help(worker_index, num_workers)):
            log.info("%s: looking for batches that others have left meanwhile", config.out)
    return _told(output, output.finish())


def _edit_drawing(config: SynthesizeConfig, weights: Adapters | AdapterState | None) -> "_EditDrawing":
    if isinstance(weights, AdapterState):
        weights = dict.fromkeys(config.objectives, weights)
    return _EditDrawing(config, weights or {})


class _EditDrawing:
    """A set that a frozen model draws, with an adapter for each objective or without any."""

    def __init__(self, config: SynthesizeConfig, adapters: Adapters) -> None:
        self.config, self.adapters = config, adapters
        self.model = base_of_adapters(config)
        self.encoders = self.model.encoder_identity()

    def begin(self) -> SyntheticSet:
        """The set, its plan accepted and fit to be drawn on this process's card."""
        config, model = self.config, self.model
        adapters: list[AdapterState | None] = [*self.adapters.values()] or [None]
        form = base_of(config)
        forms = [form] if form else [base.base_for_card(model, config.data.dtype, adapter) for adapter in adapters]
        digests = [adapter_digest(adapter) if adapter else UNTUNED for adapter in adapters]
        completion_digest = digests[-1] if digests[-1] != digests[0] else None
        chosen = NF4 if NF4 in forms else forms[0]
        plan = make_plan(config, model, self.encoders, digests[0], chosen, completion_digest)
        # Before the plan is written: one with an adapter that does not fit would stand in the way of the right one.
        for objective, adapter in self.adapters.items():
            _refuse_another_objective(adapter, objective, config)
            refuse_another_structure(adapter.facts, config)
            _refuse_another_base(adapter, plan, config)
        for one in adapters:
            base.refuse_small_card(config.out, model, plan.settings, one)
        training = training_of(adapters[0].facts if adapters[0] else None, read_manifest(config.data.shards))
        output = SyntheticSet(config.out, plan, training)
        try:
            output.accept()
        except RunError:
            # Another worker, on another card, may have begun the set meanwhile.
            if form is not None or base_of(config) in (None, plan.settings.base):
                raise
            return self.begin()
        return output

    def open(self, plan: Plan, objective: AdapterName) -> tuple[Sampler, CachedSamples]:
        """The model, loaded for the objective that is drawn first, and the samples that are drawn from."""
        cache = LatentCache.open(self.config.data, self.encoders, (self.config.split,))
        model = staged(self.model, plan.settings.base_digest) if self.config.data.stage_model else self.model
        return ImageSampler(plan, model, cache, self.adapters, objective), cache.entries(self.config.split)


def adapter_digest(adapter: AdapterState) -> str:
    """Identity of what an adapter does to its base, wherever it lies: its kind, its scale and its tensors."""
    digest = hashlib.sha256(f"{adapter.settings.kind}/{adapter.scale!r}".encode())
    for name, tensors in sorted(adapter.tensors.items()):
        for kind, tensor in sorted(tensors.items()):
            digest.update(f"{name}.{kind}/{tuple(tensor.shape)}".encode())
            digest.update(tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


class ImageSampler:
    """The model with an adapter merged, one at a time, and how the requests of a batch go through it."""

    def __init__(
        self, plan: Plan, model: ModelFolder, cache: LatentCache, adapters: Adapters, objective: AdapterName
    ) -> None:
        """Load the VAE, and the transformer for an objective, whole, onto this process's device."""
        settings = plan.settings
        self.settings, self.folder, self.adapters = settings, model, adapters
        self.device = current_device()
        self.dtype = DTYPES[settings.dtype]
        self.run_block = compiled_block_pass(self.device) if settings.compile_blocks else block_pass
        self.backbone = backbone_of(model)
        self.codec = load_codec(model, self.dtype, self.device)
        self.cache = cache
        self.entries: dict[str, CacheEntry] = {entry.key: entry for entry in cache.entries(settings.split)}
        self.token_hw = 2 * (settings.image_size_px // PX_PER_TOKEN,)
        self.sigmas = base.noise_levels(model, settings)
        self.model: Any = None
        self.merged: AdapterState | None = None
        self._load_for(objective)

    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W), of requests with one text length and one objective.

        Of a hole that is filled, what surrounds it is drawn as well, and to be replaced by what is known.

        Raises:
            RunError: If an image is not finite; names the request.
            CacheError: If a cached sample is damaged.
        """
        self._load_for(requests[0].objective)
        guidance_scale = self.settings.guidance_scale
        entries = [self.entries[request.source_key] for request in requests]
        samples = [self.cache.read(entry) for entry in entries]
        mask_latents_BSC = self._placed(flow.pack_latents(torch.stack([s["mask_latents"] for s in samples])))
        texts = [self._texts(samples)]
        if guidance_scale > 1:
            texts.append(self._texts([self.cache.read_negatives(entry) for entry in entries]))
        known = self._known(requests, samples)
        conditions = [mask_latents_BSC] if known is None else [mask_latents_BSC, known.latents_BSC]
        predict = self.backbone.predictor(
            self.model, torch.cat(conditions, dim=1), texts, self.token_hw, run_block=self.run_block
        )

        def velocity(latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
            return predict(self._placed(latents_BSC), sigma_B)

        noise = [noise_of(self.settings.seed, request, mask_latents_BSC.shape[1:]) for request in requests]
        noise_BSC, guidance = torch.stack(noise).to(self.device), self.backbone.guidance
        latents_BSC = sample(velocity, noise_BSC, self.sigmas, guidance_scale, known, guidance)
        refuse_non_finite(latents_BSC, requests, REMEDY)
        latents_hw = (2 * self.token_hw[0], 2 * self.token_hw[1])
        return self.codec.decode(flow.unpack_latents(latents_BSC, *latents_hw))

    def _texts(self, samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """What encoders made of the prompts of a batch."""
        return {name: self._placed(torch.stack([s[name] for s in samples])) for name in self.backbone.text}

    def _known(self, requests: Sequence[Request], samples: Sequence[Mapping[str, Tensor]]) -> Known | None:
        """What surrounds the holes that are filled; None where whole images are drawn."""
        if requests[0].objective == "synthesis":
            return None
        chosen = [(sample, request.hole) for sample, request in zip(samples, requests, strict=True)]
        latents_BChw = torch.stack([sample["holed_latents"][hole] for sample, hole in chosen])
        holes_BHW = unpacked(
            torch.stack([sample["holes"][hole] for sample, hole in chosen]), self.settings.image_size_px
        )
        return Known(self._placed(flow.pack_latents(latents_BChw)), hole_tokens(holes_BHW).to(self.device))

    def _load_for(self, objective: AdapterName) -> None:
        """Have the model that draws for an objective: loaded anew only if another adapter is merged into it."""
        adapter = self.adapters.get(objective)
        if self.model is not None and adapter is self.merged:
            return
        self.model = None  # two may not fit
        self.model, self.merged = base.load(self.folder, self.settings, adapter, self.device), adapter
        attention.set_backend(self.model, self.device, self.dtype)

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
        objective: For which the sampler is ready.
    """

    def __init__(
        self,
        config: SynthesizeConfig,
        output: SyntheticSet,
        sampler: Sampler,
        sources: Sources,
        should_stop: Callable[[], bool],
        objective: AdapterName,
    ) -> None:
        self.config, self.output, self.sampler, self.sources = config, output, sampler, sources
        self.should_stop, self.objective = should_stop, objective
        self.start, self.num_batches, self.num_images = time.monotonic(), 0, 0

    def draw(self, batches: Sequence[int]) -> int:
        """Draw and commit those of the batches that are open and that nobody else draws; how many that were.

        First those of the objective that was drawn last, then the others: the adapter is changed once at most.

        Raises:
            Preempted: If ``should_stop`` said so while there was work left.
        """
        before, planned, last = self.num_batches, self.output.plan.batches, self.objective
        batches = sorted(batches, key=lambda batch: planned[batch].objective != last)
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
        self.objective = requests[0].objective
        images = self.sampler.draw(requests)
        self.output.commit_batch(batch, _triples(self.output.plan, batch, images, self.sources))
        self.num_batches, self.num_images = self.num_batches + 1, self.num_images + len(requests)
        if self.num_batches % self.config.log_every_batches == 0:
            per_hour = self.num_images * S_PER_HOUR / max(time.monotonic() - self.start, 1e-9)
            log.info("batch %d: %d images drawn by this worker, %.0f per hour", batch, self.num_images, per_hour)


def _triples(plan: Plan, batch: int, images_BHW: NDArray[np.uint8], sources: Sources) -> Iterator[Triple]:
    """The samples of a batch, with all that is known about their origin."""
    for request, drawn in zip(plan.batches[batch].requests, images_BHW, strict=True):
        source, hole = sources.triple(request.source_key), sources.hole(request)
        image = drawn if hole is None else np.where(hole, drawn, source.image)
        hole_sha256 = None if hole is None else mask_sha256(hole)
        about: dict[str, Any] = plan.provenance(batch, request, mask_sha256(source.nerve_mask), hole_sha256)
        # What a phantom was constructed with does not hold for what a model draws.
        prompt = given_prompt(source.meta, plan.settings.prompts, f"sample {source.key}")
        meta = replace(source.meta, prompt=prompt, source="synthetic", labels={}, provenance=about)
        yield replace(source, key=request.key, image=image, meta=meta, inpaint_mask=hole)


def _refuse_another_objective(adapter: AdapterState, objective: AdapterName, config: SynthesizeConfig) -> None:
    name = adapter.facts.get("adapter_name", "synthesis")
    if name != objective:
        raise AdapterError(
            f"{config.adapter}: was trained for {name}, objective {config.objective} takes one for {objective}",
            f"name the run of objective.kind dual that has trained {objective}, or set objective={name}",
        )


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
