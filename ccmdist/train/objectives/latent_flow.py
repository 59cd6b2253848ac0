"""What objectives that learn a rectified flow on cached latents have in common: noise, losses, what is drawn.

An objective adds its model and how it predicts a velocity.

Shape suffixes: B samples, S packed latent tokens, C channels, h w latent rows and columns, Q noise levels.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.stream import collated
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import Known, sample
from ccmdist.diffusion.seeding import generator
from ccmdist.models.encoder_choice import PictureEncoding, load_codec
from ccmdist.train.objectives.latent_samples import Latents, LatentSamples
from ccmdist.train.objectives.objective import Batch


class LatentFlow(LatentSamples):
    """Learns ``noise - x`` on the latents of an image, given those of its mask and what else an objective knows."""

    dtype: torch.dtype
    """Of the latents that the model sees."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; no weights are read yet.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        super().__init__(config, group)
        self.token_hw = 2 * (config.data.image_size_px // PX_PER_TOKEN,)
        self.latent_hw = (2 * self.token_hw[0], 2 * self.token_hw[1])
        self.noise_schedule = self.folder.noise_schedule()
        self.shift = flow.resolution_shift(self.token_hw[0] * self.token_hw[1], self.noise_schedule)
        self.grid = flow.training_sigmas(self.shift)

    @abstractmethod
    def _velocity(
        self, model: torch.nn.Module, batch: Batch, latents_BSC: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        """The predicted velocity of packed noisy latents, (B, S, C), for the samples of ``batch``."""

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean squared error of the predicted velocity over the target tokens of a micro-batch."""
        batch = self._posed(batch, batch["positions"])
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise, sigmas = zip(*(self._draw(position, x_BSC.shape[1:]) for position in batch["positions"]), strict=True)
        self._drawn += [float(sigma) for sigma in sigmas]
        sigma_B = torch.stack(sigmas)
        return self._training_loss(self._errors_BSC(model, batch, x_BSC, torch.stack(noise), sigma_B), batch, sigma_B)

    def _posed(self, batch: Batch, places: Sequence[int | str]) -> Batch:
        """The samples as the model is asked about them; here as they were read.

        Args:
            batch: As collated.
            places: On which what is drawn for a sample depends: its position in the run, or its key.
        """
        return batch

    def _training_loss(self, errors_BSC: torch.Tensor, batch: Batch, sigma_B: torch.Tensor) -> torch.Tensor:
        """What a step makes smaller: here the mean of all squared errors."""
        return self._held_out_loss_B(errors_BSC, batch).mean()

    def _held_out_loss_B(self, errors_BSC: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The mean squared error of each sample over the tokens that count: here over all."""
        return errors_BSC.mean(dim=(1, 2))

    def _known(self, batch: Batch) -> Known | None:
        """What of the images is not to be drawn: here nothing."""
        return None

    def _shown(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Latents that a picture shows of samples beside what was drawn."""
        return batch["mask_latents"], batch["image_latents"]

    def _sampled(self, model: torch.nn.Module, entry: CacheEntry) -> Latents:
        batch = self._posed(collated(self.cache, [entry]), [entry.key])
        noise_BSC = torch.randn(
            (1, self.token_hw[0] * self.token_hw[1], 64),
            generator=generator(self.config.seed, "images", entry.key),
        )
        sigmas = flow.sampling_sigmas(self.config.monitor.denoise_steps, self.shift, self.noise_schedule)

        def velocity(latents_BSC: torch.Tensor, sigma_B: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self._velocity(model, batch, latents_BSC, sigma_B),)

        noise_BSC = noise_BSC.to(self.group.device)
        sampled_BSC = sample(velocity, noise_BSC, sigmas, 1.0, self._known(batch))
        return *self._shown(batch), flow.unpack_latents(sampled_BSC, *self.latent_hw)

    def _noisy(self, position: int, entry: CacheEntry) -> Latents:
        batch = self._posed(collated(self.cache, [entry]), [position])
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise, sigma = self._draw(position, x_BSC.shape[1:])
        noisy = flow.interpolate(x_BSC, noise[None], sigma[None])
        return *self._shown(batch), flow.unpack_latents(noisy, *self.latent_hw)

    def _codec(self) -> PictureEncoding:
        return load_codec(self.folder, torch.float32, self.group.device)

    def _draw(self, position: int, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and noise level of the sample at ``position`` of the run, whichever rank it falls to."""
        source = generator(self.config.seed, "train", position)
        sigma = flow.draw_sigma(self.config.sigma_sampling, self.grid, source)
        return torch.randn(shape, generator=source), sigma

    def _held_out_losses(self, model: torch.nn.Module, entry: CacheEntry) -> torch.Tensor:
        sigmas_Q = torch.stack([flow.nearest_on_grid(s, self.grid) for s in self.config.validation.sigmas])
        num = len(sigmas_Q)
        batch = self._posed(collated(self.cache, [entry] * num), [entry.key] * num)
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise = torch.randn(x_BSC.shape[1:], generator=generator(self.config.seed, "held out", entry.key))
        errors_BSC = self._errors_BSC(model, batch, x_BSC, noise.expand_as(x_BSC), sigmas_Q)
        return self._held_out_loss_B(errors_BSC, batch)

    def _errors_BSC(
        self,
        model: torch.nn.Module,
        batch: Batch,
        x_BSC: torch.Tensor,
        noise_BSC: torch.Tensor,
        sigma_B: torch.Tensor,
    ) -> torch.Tensor:
        """Squared errors of the predicted velocity."""
        device = self.group.device
        x_BSC, noise_BSC = x_BSC.to(device), noise_BSC.to(device)
        predicted_BSC = self._velocity(model, batch, flow.interpolate(x_BSC, noise_BSC, sigma_B), sigma_B)
        return (predicted_BSC.float() - flow.velocity_target(x_BSC, noise_BSC)).square()
