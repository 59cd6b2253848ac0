"""What objectives that learn on cached latents have in common: samples, their order, held-out losses, pictures.

An objective adds its model, and what it makes of noise.

Shape suffixes: B samples, C channels, h w latent rows and columns, Q noise levels.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.latent_cache import LatentCache
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.objectives.ordered_samples import OrderedSamples, shared_by_ranks, spread_over

Latents = tuple[torch.Tensor, ...]
"""Of one sample, (1, C, h, w) each: what is shown of it, and what a model draws."""


class Codec(Protocol):
    """A VAE."""

    def decode(self, latents_BChw: torch.Tensor) -> np.ndarray:
        """Grey images, uint8 (B, H, W), of latents."""
        ...


class LatentSamples(OrderedSamples, ABC):
    """The samples of a cache, in the order of the run."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache and plan the order; no weights are read yet.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
            ModelError: If the model folder is not complete, or of another kind.
        """
        self.folder = ModelFolder.open(config.data.model, *config.objective.model_kinds)
        self.cache = LatentCache.open(config.data, self.folder.encoder_identity())
        self.data_digest = self.cache.digest
        super().__init__(config, group, self.cache, self.cache.entries("train"))
        self._drawn: list[float] = []

    @abstractmethod
    def _held_out_losses(self, model: torch.nn.Module, entry: CacheEntry) -> torch.Tensor:
        """The loss of a held-out sample at each of the levels `validation.sigmas`, (Q,)."""

    @abstractmethod
    def _sampled(self, model: torch.nn.Module, entry: CacheEntry) -> Latents:
        """Latents that a picture shows of a held-out sample, and what the model draws of it. Collective."""

    @abstractmethod
    def _noisy(self, position: int, entry: CacheEntry) -> Latents:
        """Latents that a picture shows of the sample at a position of the run, and how noisy the model sees it."""

    @abstractmethod
    def _codec(self) -> Codec:
        """The VAE, loaded when pictures are wanted."""

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out loss at each fixed noise level and their mean; noise is fixed per sample. Collective."""
        entries = spread_over(self.cache.entries("val"), self.config.validation.num_samples)
        if not entries:
            return {}
        sums = [0.0] * len(self.config.validation.sigmas)
        for entry, weight in shared_by_ranks(entries, self.group):
            losses_Q = self._held_out_losses(model, entry)
            sums = [total + weight * float(loss) for total, loss in zip(sums, losses_Q, strict=True)]
        losses = [total / len(entries) for total in self.group.total(sums)]
        named = {f"sigma_{s:g}": loss for s, loss in zip(self.config.validation.sigmas, losses, strict=True)}
        return {"mean": sum(losses) / len(losses)} | named

    def describe(self) -> dict[str, float]:
        """No figures beside the losses."""
        return {}

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Rows of mask, real and sampled image for some held-out samples, on rank 0. Collective."""
        rows = self._sampled_rows(model)
        return {"samples/mask_real_sampled": self._decoded_grid(rows)} if self.group.ranks.is_first else {}

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """Rows of mask, target and noisy target of the first samples of the run; local."""
        return {"first_batch/mask_target_input": self._first_batch_grid()}

    def _first_batch_grid(self) -> torch.Tensor:
        chosen = self.order.cell(0)[: self.config.monitor.num_images]
        return self._decoded_grid([self._noisy(place, self.entries[index]) for place, index in enumerate(chosen)])

    def drawn_sigmas(self) -> torch.Tensor:
        """Noise levels drawn by this rank since the last call."""
        drawn, self._drawn = self._drawn, []
        return torch.tensor(drawn)

    def _sampled_rows(self, model: torch.nn.Module) -> list[Latents]:
        """What is shown of some held-out samples. Collective."""
        num_images = self.config.monitor.num_images
        entries = spread_over(self.cache.entries("val"), num_images) or self.entries[:num_images]
        return [self._sampled(model, entry) for entry in entries]

    def _decoded_grid(self, rows: Iterable[Latents]) -> torch.Tensor:
        """Decode latents row by row and set them in a grid, uint8 (H, W)."""
        codec = self._codec()
        pictures = [[codec.decode(latents.float().to(self.group.device))[0] for latents in row] for row in rows]
        return torch.from_numpy(np.vstack([np.hstack(row) for row in pictures]))
