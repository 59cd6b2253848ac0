"""MAISI-style latent diffusion from scratch, trained by rectified flow on the same cached latents as the adapter.

Shape suffixes: B samples, S packed latent tokens, C channels.
"""

from typing import Any

import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.baselines import MaisiSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.diffusion import flow
from ccmdist.diffusion.seeding import generator
from ccmdist.models import maisi
from ccmdist.train.objectives.latent_flow import LatentFlow
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.one_network import OneNetwork


class MaisiObjective(OneNetwork, LatentFlow):
    """Learns ``noise - x`` given the mask's latents, the clinical group and the size of a pixel; all in fp32."""

    dtype = torch.float32

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Open the cache, and the shards for the size of their pixels.

        Raises:
            CacheError: If the cache is missing or was made for something else.
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        super().__init__(config, group)
        assert isinstance(config.objective, MaisiSettings), config.objective
        self.settings = config.objective
        self.um_per_px = ShardSamples(config.data, ("train", "val")).um_per_px
        self.base_digest = maisi.latents_digest(self.folder.encoder_identity())

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The U-Net, every weight of it trained; the engine cuts it over the ranks."""
        self.network = maisi.make_maisi(self.settings, self.config.seed).to(self.group.device).train()
        return self.network

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """As of every flow; from some samples, chosen by their position in the run, the group is withheld."""
        groups = [
            None if self._is_withheld(position) else group
            for position, group in zip(batch["positions"], batch["clinical_groups"], strict=True)
        ]
        return super().loss(model, batch | {"clinical_groups": groups})

    def _is_withheld(self, position: int) -> bool:
        source = generator(self.config.seed, "withheld group", position)
        return float(torch.rand((), generator=source)) < self.settings.null_fraction

    def _velocity(
        self, model: torch.nn.Module, batch: Batch, latents_BSC: torch.Tensor, sigma_B: torch.Tensor
    ) -> torch.Tensor:
        device = self.group.device
        predicted_BChw = maisi.velocity(
            model,
            flow.unpack_latents(latents_BSC.to(device, self.dtype), *self.latent_hw),
            batch["mask_latents"].to(device, self.dtype),
            maisi.classes(batch["clinical_groups"]).to(device),
            torch.tensor([self.um_per_px[key] for key in batch["keys"]], device=device),
            sigma_B.to(device),
        )
        return flow.pack_latents(predicted_BChw)
