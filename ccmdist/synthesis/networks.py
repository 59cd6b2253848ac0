"""Draw with networks that were trained from scratch: SPADE from masks, MAISI and MSDM from the cache.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, h w latent rows and columns,
H W rows and columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccmdist.ccm.groups import ClinicalGroup
from ccmdist.cluster.device import current_device
from ccmdist.config.data import PX_PER_TOKEN, DataSettings
from ccmdist.config.objectives.baselines import SpadeSettings
from ccmdist.config.objectives.msdm import MsdmSettings
from ccmdist.config.objectives.objective import AdapterName, NetworkKind
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.given_prompts import prompted_group
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.manifest import read_manifest
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.trained_on import training_of
from ccmdist.diffusion import ddpm, flow
from ccmdist.diffusion.sampler import sample
from ccmdist.errors import ModelError
from ccmdist.models import maisi, msdm_unet, spade
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.msdm import MsdmCodec
from ccmdist.models.network_kinds import NETWORKS
from ccmdist.models.network_state import NetworkState
from ccmdist.precompute.fill import DTYPES
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import Plan
from ccmdist.synthesis.planning import make_network_plan
from ccmdist.synthesis.requests import Request
from ccmdist.synthesis.sampler import Sampler, noise_of, refuse_non_finite
from ccmdist.synthesis.trained_for import refuse_another_structure

REMEDY: Final = "train it anew with a lower optim.lr, or name an earlier checkpoint"
TOKEN_CHANNELS: Final = 4 * maisi.LATENT_CHANNELS
Opened = tuple[Sampler, CachedSamples]
"""What draws, and the samples that it draws from."""


class SpadeSampler:
    """Draws from masks and groups in one pass; reads the shards."""

    def __init__(self, plan: Plan, state: NetworkState, samples: ShardSamples) -> None:
        """Load the generator onto this process's device."""
        assert isinstance(state.about.settings, SpadeSettings), state.about.kind
        self.plan, self.device, self.samples = plan, current_device(), samples
        self.noise_dim = state.about.settings.noise_dim
        self.network = state.network(self.device)
        self.entries = {entry.key: entry for entry in samples.entries(plan.settings.split)}

    @torch.no_grad()
    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W).

        Raises:
            RunError: If an image is not finite; names the request.
            ShardError: If a sample has changed since the set was opened.
        """
        masks = [self.samples.triple(self.entries[request.source_key]).nerve_mask for request in requests]
        masks_BHW = torch.from_numpy(np.stack(masks)).to(self.device)
        noise = [noise_of(self.plan.settings.seed, request, (self.noise_dim,)) for request in requests]
        labels_BKHW = spade.label_map(masks_BHW, _groups(self.plan, requests))
        images_B1HW = self.network(labels_BKHW, torch.stack(noise).to(self.device))
        refuse_non_finite(images_B1HW, requests, REMEDY)
        grey = ((images_B1HW[:, 0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return grey.cpu().numpy()


class MaisiSampler:
    """Draws latents by the flow, with guidance away from the null class, and decodes them; reads cache and shards."""

    def __init__(
        self, plan: Plan, state: NetworkState, samples: ShardSamples, cache: LatentCache, model: ModelFolder
    ) -> None:
        """Load the U-Net and the VAE onto this process's device."""
        settings = plan.settings
        self.plan, self.device, self.cache, self.um_per_px = plan, current_device(), cache, samples.um_per_px
        self.network = state.network(self.device)
        self.codec = LatentCodec.load(model, DTYPES[settings.dtype], self.device)
        self.entries: dict[str, CacheEntry] = {entry.key: entry for entry in cache.entries(settings.split)}
        edge, schedule = settings.image_size_px // PX_PER_TOKEN, model.noise_schedule()
        self.num_tokens, self.latent_hw = edge**2, (2 * edge, 2 * edge)
        self.sigmas = flow.sampling_sigmas(
            settings.denoise_steps, flow.resolution_shift(self.num_tokens, schedule), schedule
        )

    @torch.no_grad()
    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W).

        Raises:
            RunError: If an image is not finite; names the request.
            CacheError: If a cached sample is damaged.
        """
        seed, scale = self.plan.settings.seed, self.plan.settings.guidance_scale
        masks = [self.cache.read(self.entries[request.source_key])["mask_latents"] for request in requests]
        mask_BChw = torch.stack(masks).float().to(self.device)
        um_per_px_B = torch.tensor([self.um_per_px[request.source_key] for request in requests], device=self.device)
        class_B = maisi.classes(_groups(self.plan, requests)).to(self.device)
        branches = [class_B, torch.full_like(class_B, maisi.NULL_CLASS)][: 2 if scale > 1 else 1]

        def velocity(latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
            noisy_BChw = flow.unpack_latents(latents_BSC, *self.latent_hw)
            return tuple(
                flow.pack_latents(maisi.velocity(self.network, noisy_BChw, mask_BChw, one_B, um_per_px_B, sigma_B))
                for one_B in branches
            )

        noise = [noise_of(seed, request, (self.num_tokens, TOKEN_CHANNELS)) for request in requests]
        latents_BSC = sample(velocity, torch.stack(noise).to(self.device), self.sigmas, scale)
        refuse_non_finite(latents_BSC, requests, REMEDY)
        return self.codec.decode(flow.unpack_latents(latents_BSC, *self.latent_hw))


class MsdmSampler:
    """Draws latents by DDIM, DDPM or between, with guidance away from the negative prompt; reads the cache alone."""

    def __init__(self, plan: Plan, state: NetworkState, cache: LatentCache, model: ModelFolder) -> None:
        """Load the U-Net and the VAE onto this process's device. Prompts need no encoder."""
        settings, of_network = plan.settings, state.about.settings
        assert isinstance(of_network, MsdmSettings), state.about.kind
        self.plan, self.device, self.cache = plan, current_device(), cache
        self.schedule, self.sees_mask = ddpm.NoiseSchedule.of(of_network), of_network.sees_mask
        self.network = state.network(self.device)
        self.codec = MsdmCodec.load(model, DTYPES[settings.dtype], self.device)
        self.entries: dict[str, CacheEntry] = {entry.key: entry for entry in cache.entries(settings.split)}

    @torch.no_grad()
    def draw(self, requests: Sequence[Request]) -> NDArray[np.uint8]:
        """Grey images, uint8 (B, H, W).

        Raises:
            RunError: If an image is not finite; names the request.
            CacheError: If a cached sample is damaged.
        """
        plan = self.plan.settings
        entries = [self.entries[request.source_key] for request in requests]
        samples = [self.cache.read(entry) for entry in entries]
        mask_BChw = self._placed([sample["mask_latents"] for sample in samples])
        branches = [self._placed([sample["prompt_embeds"] for sample in samples])]
        if plan.guidance_scale > 1:
            branches.append(self._placed([self.cache.read_negative(entry) for entry in entries]))

        def predict(latents_BChw: Tensor, level: int) -> tuple[Tensor, ...]:
            level_B = torch.full((len(latents_BChw),), level, device=self.device)
            mask = mask_BChw if self.sees_mask else None
            return tuple(
                msdm_unet.predicted(self.network, latents_BChw, mask, text_BLD, level_B) for text_BLD in branches
            )

        def noise(denoise_step: int | None = None) -> Tensor:
            return self._placed(
                [noise_of(plan.seed, request, mask_BChw.shape[1:], denoise_step) for request in requests]
            )

        latents_BChw = ddpm.sample(
            predict, noise(), self.schedule, plan.denoise_steps, plan.guidance_scale, plan.eta, noise
        )
        refuse_non_finite(latents_BChw, requests, REMEDY)
        return self.codec.decode(latents_BChw)

    def _placed(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).float().to(self.device)


class NetworkDrawing:
    """A set that a network from scratch draws."""

    def __init__(self, config: SynthesizeConfig, state: NetworkState) -> None:
        """Nothing is read yet."""
        self.config, self.state = config, state

    def begin(self) -> SyntheticSet:
        """The set, its plan accepted.

        Raises:
            ConfigError: If in training something else stood for the nerves.
            ModelError: If the network draws images of another size, or in latents of another VAE.
            RunError: If the folder holds something else.
        """
        # Before the plan is written, which would stand in the way.
        refuse_another_structure(self.state.about.facts, self.config)
        _refuse_misfit(self.config, self.state)
        if not self.state.about.settings.sees_mask:
            log.warning("%s: learnt without masks: its images follow the prompt alone", self.config.network)
        training = training_of(self.state.about.facts, read_manifest(self.config.data.shards))
        output = SyntheticSet(self.config.out, make_network_plan(self.config, self.state.about), training)
        output.accept()
        return output

    def open(self, plan: Plan, _objective: AdapterName) -> Opened:
        """The network, loaded, and the samples that are drawn from; it draws whole images alone."""
        return SAMPLERS[self.state.about.kind](plan, self.state, self.config.data)


def _spade(plan: Plan, state: NetworkState, data: DataSettings) -> Opened:
    samples = ShardSamples(data, (plan.settings.split,))
    return SpadeSampler(plan, state, samples), samples.entries(plan.settings.split)


def _maisi(plan: Plan, state: NetworkState, data: DataSettings) -> Opened:
    model, cache = _cached(plan, data)
    samples = ShardSamples(data, (plan.settings.split,))
    return MaisiSampler(plan, state, samples, cache, model), cache.entries(plan.settings.split)


def _msdm(plan: Plan, state: NetworkState, data: DataSettings) -> Opened:
    model, cache = _cached(plan, data)
    return MsdmSampler(plan, state, cache, model), cache.entries(plan.settings.split)


def _cached(plan: Plan, data: DataSettings) -> tuple[ModelFolder, LatentCache]:
    model = ModelFolder.open(data.model)
    return model, LatentCache.open(data, model.encoder_identity(), (plan.settings.split,))


SAMPLERS: Final[Mapping[NetworkKind, Callable[[Plan, NetworkState, DataSettings], Opened]]] = {
    "spade": _spade,
    "maisi": _maisi,
    "msdm": _msdm,
}
"""What loads each kind of network that draws."""


def _groups(plan: Plan, requests: Sequence[Request]) -> list[ClinicalGroup | None]:
    """The group that each image is drawn as: of the mask or, in a control, the next one."""
    prompts = plan.settings.prompts
    return [prompted_group(one.clinical_group, prompts, f"sample {one.source_key}") for one in requests]


def _refuse_misfit(config: SynthesizeConfig, state: NetworkState) -> None:
    """Check that a network draws images of the wanted size, in the latents of the model folder.

    Raises:
        ModelError: If it does not.
    """
    about, data = state.about, config.data
    if about.image_size_px != data.image_size_px:
        raise ModelError(
            f"{config.network}: draws images of {about.image_size_px} px, data.image_size_px is {data.image_size_px}",
            f"set data.image_size_px={about.image_size_px}",
        )
    if (digest := NETWORKS[about.kind].encoders_digest) is not None:
        trained_on = about.facts.get("base_digest", "(not known)")
        found = digest(ModelFolder.open(data.model, *about.settings.model_kinds).encoder_identity())
        if trained_on != found:
            raise ModelError(
                f"{config.network}: was trained on latents of the VAE {trained_on[:12]}, {data.model} holds "
                f"{found[:12]}",
                "set data.model to the model whose latents it was trained on",
            )
