"""MSDM's diffusion from scratch, on cached latents and text states of a model folder that `msdm_vae` has left.

Shape suffixes: B samples, L text tokens, D text width, C channels, h w latent rows and columns, Q noise levels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.msdm import MsdmSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.stream import collated
from ccmdist.diffusion import ddpm
from ccmdist.diffusion.seeding import generator
from ccmdist.errors import ConfigError
from ccmdist.models import msdm_unet
from ccmdist.models.msdm import MsdmCodec
from ccmdist.train.objectives.latent_samples import Latents, LatentSamples
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.one_network import OneNetwork


class MsdmObjective(OneNetwork, LatentSamples):
    """Learns noise, or velocity, of noisy latents given those of the mask and the states of the prompt; all in fp32."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ModelError: If the model folder is not complete, or not one of MSDM.
            ConfigError: If there are too few samples, the batch does not divide over the ranks, or latents do not halve
                as often as the network does.
        """
        super().__init__(config, group)
        assert isinstance(config.objective, MsdmSettings), config.objective
        self.settings = config.objective
        self.schedule = ddpm.NoiseSchedule.of(self.settings)
        self.base_digest = msdm_unet.encoders_digest(self.folder.encoder_identity())
        # The text never sees the mask, so the negative prompt has the same states in every sample.
        self.null_LD = self.cache.read_negative(self.entries[0]).float()
        self.latent_shape = tuple(self.cache.read(self.entries[0])["image_latents"].shape)
        _refuse_edge(self.latent_shape[-1], self.settings, config.data.image_size_px)

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The U-Net, every weight of it trained; the engine cuts it over the ranks."""
        ends = msdm_unet.Ends(self.latent_shape[0], self.null_LD.shape[-1])
        self.network = msdm_unet.make_unet(self.settings, ends, self.config.seed).to(self.group.device).train()
        return self.network

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean error of what is predicted; of some samples, by their position in the run, the prompt is dropped."""
        places, x_BChw = batch["positions"], batch["image_latents"].float()
        noise, levels = zip(*(self._draw(place, x_BChw.shape[1:]) for place in places), strict=True)
        level_B = torch.stack(levels)
        self._drawn += self.schedule.sigmas(level_B).tolist()
        text_BLD = msdm_unet.dropped(
            batch["prompt_embeds"].float(), self.null_LD, [self._is_dropped(place) for place in places]
        )
        devices = [self.group.device] if self.group.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self._bits("dropout", places[0]))  # of a cell, which every world size sees whole
            return self._errors_B(model, batch | {"prompt_embeds": text_BLD}, torch.stack(noise), level_B).mean()

    def _held_out_losses(self, model: torch.nn.Module, entry: CacheEntry) -> torch.Tensor:
        """At the levels 1000 sigma: a share of the way to pure noise, not the share of noise."""
        level_Q = torch.tensor([_level(sigma) for sigma in self.config.validation.sigmas])
        batch = collated(self.cache, [entry] * len(level_Q))
        noise = torch.randn(self.latent_shape, generator=generator(self.config.seed, "held out", entry.key))
        return self._quietly(model, batch, noise.expand(len(level_Q), *noise.shape), level_Q)

    @torch.no_grad()
    def _quietly(
        self, model: torch.nn.Module, batch: Batch, noise_BChw: torch.Tensor, level_B: torch.Tensor
    ) -> torch.Tensor:
        """Errors without dropout."""
        self.network.eval()
        try:
            return self._errors_B(model, batch, noise_BChw, level_B)
        finally:
            self.network.train()

    def _errors_B(
        self, model: torch.nn.Module, batch: Batch, noise_BChw: torch.Tensor, level_B: torch.Tensor
    ) -> torch.Tensor:
        """The mean error of each sample."""
        x_BChw = batch["image_latents"].float()
        noisy_BChw = self.schedule.noisy(x_BChw, noise_BChw, level_B)
        target_BChw = self.schedule.target(x_BChw, noise_BChw, level_B).to(self.group.device)
        found_BChw = self._predicted(model, batch, noisy_BChw, level_B).float()
        error = F.l1_loss if self.settings.loss == "l1" else F.mse_loss
        return error(found_BChw, target_BChw, reduction="none").mean(dim=(1, 2, 3))

    def _predicted(
        self, model: torch.nn.Module, batch: Batch, latents_BChw: torch.Tensor, level_B: torch.Tensor
    ) -> torch.Tensor:
        device = self.group.device
        mask_BChw = batch["mask_latents"].to(device, torch.float32) if self.settings.mask_condition else None
        text_BLD = batch["prompt_embeds"].to(device, torch.float32)
        return msdm_unet.predicted(model, latents_BChw.to(device), mask_BChw, text_BLD, level_B.to(device))

    def _sampled(self, model: torch.nn.Module, entry: CacheEntry) -> Latents:
        batch = collated(self.cache, [entry])
        noise = torch.randn((1, *self.latent_shape), generator=generator(self.config.seed, "images", entry.key))

        def predict(latents_BChw: torch.Tensor, level: int) -> tuple[torch.Tensor, ...]:
            return (self._predicted(model, batch, latents_BChw, torch.tensor([level])),)

        self.network.eval()
        try:
            steps = self.config.monitor.denoise_steps
            drawn_BChw = ddpm.sample(predict, noise.to(self.group.device), self.schedule, steps)
        finally:
            self.network.train()
        return *self._shown(batch), drawn_BChw

    def _noisy(self, position: int, entry: CacheEntry) -> Latents:
        batch = collated(self.cache, [entry])
        noise, level = self._draw(position, self.latent_shape)
        x_BChw = batch["image_latents"].float()
        return *self._shown(batch), self.schedule.noisy(x_BChw, noise[None], level[None])

    def _shown(self, batch: Batch) -> Latents:
        """Mask and image; of the mask the VAE's latents are kept as they are, of the image scaled."""
        scaling = self.folder.config("vae")["scaling_factor"]
        return batch["mask_latents"].float() * scaling, batch["image_latents"]

    def _codec(self) -> MsdmCodec:
        return MsdmCodec.load(self.folder, torch.float32, self.group.device)

    def _draw(self, position: int, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and noise level of the sample at ``position`` of the run, whichever rank it falls to."""
        source = generator(self.config.seed, "train", position)
        level = torch.randint(ddpm.NUM_LEVELS, (), generator=source)
        return torch.randn(tuple(shape), generator=source), level

    def _is_dropped(self, position: int) -> bool:
        source = generator(self.config.seed, "dropped prompt", position)
        return float(torch.rand((), generator=source)) < self.settings.null_fraction

    def _bits(self, purpose: str, position: int) -> int:
        return int(torch.randint(2**62, (), generator=generator(self.config.seed, purpose, position)))


def _level(sigma: float) -> int:
    return min(round(sigma * ddpm.NUM_LEVELS), ddpm.NUM_LEVELS - 1)


def _refuse_edge(edge: int, settings: MsdmSettings, image_size_px: int) -> None:
    """Refuse latents that the network cannot halve as often as it does; how small they are, the VAE says.

    Raises:
        ConfigError: With all numbers.
    """
    factor = 2 ** (len(settings.channels) - 1)
    if edge % factor:
        wanted = image_size_px // edge * factor
        raise ConfigError(
            f"objective.channels: {len(settings.channels)} levels need latents whose edge {factor} divides; those of "
            f"data.image_size_px {image_size_px} have {edge}",
            f"set data.image_size_px to a multiple of {wanted}, or use fewer levels",
        )
