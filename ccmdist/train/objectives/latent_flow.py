"""What objectives that learn a rectified flow on cached latents have in common: samples, noise, losses, pictures.

An objective adds its model and how it predicts a velocity.

Shape suffixes: B samples, S packed latent tokens, C channels, h w latent rows and columns, Q noise levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from ccmdist.adapters.growth import RankGrowth
from ccmdist.cluster.preemption import ignore_stop_signals
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.order import Order
from ccmdist.data.stream import SampleStream, batches, collated
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import Known, sample
from ccmdist.diffusion.seeding import generator
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.objectives.objective import Batch


class LatentFlow(ABC):
    """Learns ``noise - x`` on the latents of an image, given those of its mask and what else an objective knows."""

    dtype: torch.dtype
    """Of the latents that the model sees."""

    growth: RankGrowth | None = None
    """Of ranks that grow; see :class:`Objective`."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; no weights are read yet.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        self.config, self.group = config, group
        self.folder = ModelFolder.open(config.data.model)
        self.cache = LatentCache.open(config.data, self.folder.encoder_identity())
        self.entries = self.cache.entries("train")
        self.order = Order(self.entries, config.seed, config.micro_batch_size, config.balance, config.shuffle_window)
        self.order.cells_of_step(0, config.global_batch_size, group.ranks.global_rank, group.ranks.world_size)
        self.data_digest = self.cache.digest
        self.token_hw = 2 * (config.data.image_size_px // PX_PER_TOKEN,)
        self.latent_hw = (2 * self.token_hw[0], 2 * self.token_hw[1])
        self.noise_schedule = self.folder.noise_schedule()
        self.shift = flow.resolution_shift(self.token_hw[0] * self.token_hw[1], self.noise_schedule)
        self.grid = flow.training_sigmas(self.shift)
        self._drawn: list[float] = []

    @abstractmethod
    def _velocity(
        self, model: torch.nn.Module, batch: Batch, latents_BSC: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        """The predicted velocity of packed noisy latents, (B, S, C), for the samples of ``batch``."""

    def batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from ``first_step`` on."""
        ranks = self.group.ranks
        stream = SampleStream(
            self.cache,
            self.entries,
            self.order,
            self.config.global_batch_size,
            ranks.global_rank,
            ranks.world_size,
            first_step,
        )
        return batches(stream, self.config.num_loader_workers, ignore_stop_signals)

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean squared error of the predicted velocity over the target tokens of a micro-batch."""
        batch = self._posed(batch, batch["positions"])
        x_BSC = flow.pack_latents(batch["image_latents"].float())
        noise, sigmas = zip(*(self._draw(position, x_BSC.shape[1:]) for position in batch["positions"]), strict=True)
        self._drawn += [float(sigma) for sigma in sigmas]
        sigma_B = torch.stack(sigmas)
        return self._training_loss(self._errors_BSC(model, batch, x_BSC, torch.stack(noise), sigma_B), batch, sigma_B)

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out loss at each fixed noise level and their mean; noise is fixed per sample. Collective."""
        entries = spread_over(self.cache.entries("val"), self.config.validation.num_samples)
        if not entries:
            return {}
        sigmas_Q = torch.stack([flow.nearest_on_grid(s, self.grid) for s in self.config.validation.sigmas])
        sums = [0.0] * len(sigmas_Q)
        for entry, weight in shared_by_ranks(entries, self.group):
            losses_Q = self._held_out_losses(model, entry, sigmas_Q)
            sums = [total + weight * float(loss) for total, loss in zip(sums, losses_Q, strict=True)]
        losses = [total / len(entries) for total in self.group.total(sums)]
        named = {f"sigma_{s:g}": loss for s, loss in zip(self.config.validation.sigmas, losses, strict=True)}
        return {"mean": sum(losses) / len(losses)} | named

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Rows of mask, real and sampled image for some held-out samples, on rank 0. Collective."""
        rows = self._sampled_rows(model)
        return {"samples/mask_real_sampled": self._decoded_grid(rows)} if self.group.ranks.is_first else {}

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """Rows of mask, target and noisy target of the first samples of the run; local."""
        return {"first_batch/mask_target_input": self._first_batch_grid()}

    def _first_batch_grid(self) -> torch.Tensor:
        rows = []
        for position, index in enumerate(self.order.cell(0)[: self.config.monitor.num_images]):
            batch = self._posed(collated(self.cache, [self.entries[index]]), [position])
            x_BSC = flow.pack_latents(batch["image_latents"].float())
            noise, sigma = self._draw(position, x_BSC.shape[1:])
            noisy = flow.interpolate(x_BSC, noise[None], sigma[None])
            rows.append((*self._shown(batch), flow.unpack_latents(noisy, *self.latent_hw)))
        return self._decoded_grid(rows)

    def drawn_sigmas(self) -> torch.Tensor:
        """Noise levels drawn by this rank since the last call."""
        drawn, self._drawn = self._drawn, []
        return torch.tensor(drawn)

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

    def _sampled_rows(self, model: torch.nn.Module) -> list[tuple[torch.Tensor, ...]]:
        """Latents of some held-out samples, what is shown of each and what the model draws of it. Collective."""
        num_images = self.config.monitor.num_images
        entries = spread_over(self.cache.entries("val"), num_images) or self.entries[:num_images]
        rows = []
        for entry in entries:
            batch = self._posed(collated(self.cache, [entry]), [entry.key])
            noise_BSC = torch.randn(
                (1, self.token_hw[0] * self.token_hw[1], 64),
                generator=generator(self.config.seed, "images", entry.key),
            )
            sigmas = flow.sampling_sigmas(self.config.monitor.denoise_steps, self.shift, self.noise_schedule)

            def velocity(
                latents_BSC: torch.Tensor, sigma_B: torch.Tensor, batch: Batch = batch
            ) -> tuple[torch.Tensor, ...]:
                return (self._velocity(model, batch, latents_BSC, sigma_B),)

            noise_BSC = noise_BSC.to(self.group.device)
            sampled_BSC = sample(velocity, noise_BSC, sigmas, 1.0, self._known(batch))
            rows.append((*self._shown(batch), flow.unpack_latents(sampled_BSC, *self.latent_hw)))
        return rows

    def _draw(self, position: int, shape: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise and noise level of the sample at ``position`` of the run, whichever rank it falls to."""
        source = generator(self.config.seed, "train", position)
        sigma = flow.draw_sigma(self.config.sigma_sampling, self.grid, source)
        return torch.randn(shape, generator=source), sigma

    def _held_out_losses(self, model: torch.nn.Module, entry: CacheEntry, sigmas_Q: torch.Tensor) -> torch.Tensor:
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

    def _decoded_grid(self, rows: Iterable[tuple[torch.Tensor, ...]]) -> torch.Tensor:
        """Decode latents row by row and set them in a grid, uint8 (H, W)."""
        codec = LatentCodec.load(self.folder, torch.float32, self.group.device)
        pictures = [[codec.decode(latents.float().to(self.group.device))[0] for latents in row] for row in rows]
        return torch.from_numpy(np.vstack([np.hstack(row) for row in pictures]))


def spread_over(entries: Sequence[CacheEntry], count: int) -> Sequence[CacheEntry]:
    """Up to ``count`` of the samples, evenly spread."""
    return tuple(entries[i * len(entries) // count] for i in range(count)) if len(entries) > count else entries


def shared_by_ranks(entries: Sequence[CacheEntry], group: ProcessGroup) -> Iterable[tuple[CacheEntry, int]]:
    """The samples of this rank, each with its weight in a sum.

    Every rank runs equally many forwards, for each of them is a collective; what is one too many weighs nothing.
    """
    ranks, num = group.ranks, len(entries)
    for index in range(ranks.global_rank, -(-num // ranks.world_size) * ranks.world_size, ranks.world_size):
        yield entries[index % num], int(index < num)
