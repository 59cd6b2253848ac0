"""What objectives on the pixels of labelled or segmented frames have in common: samples and their order."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch

from ccmdist.adapters.growth import RankGrowth
from ccmdist.cluster.preemption import ignore_stop_signals
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.data.order import Order
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.stream import SampleSource, SampleStream, batches, collated
from ccmdist.train.objectives.latent_samples import spread_over
from ccmdist.train.objectives.objective import Batch


class PixelSamples(ABC):
    """The samples of shards, in the order of the run."""

    growth: RankGrowth | None = None
    source: SampleSource
    """Where samples are read."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards and plan the order.

        Raises:
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        self.config, self.group = config, group
        self.samples = ShardSamples(config.data, ("train", "val"))
        self.entries = self.samples.entries("train")
        self.order = Order(self.entries, config.seed, config.micro_batch_size, config.balance, config.shuffle_window)
        self.order.cells_of_step(0, config.global_batch_size, group.ranks.global_rank, group.ranks.world_size)
        self.data_digest = self.samples.digest

    @abstractmethod
    def _row(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """What is shown of one sample, uint8 (H, W) or (H, W, 3). Collective."""

    @abstractmethod
    def _name_of_rows(self) -> str:
        """What the columns of a picture show."""

    def batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from ``first_step`` on."""
        ranks = self.group.ranks
        share = (self.config.global_batch_size, ranks.global_rank, ranks.world_size)
        stream = SampleStream(self.source, self.entries, self.order, *share, first_step)
        return batches(stream, self.config.num_loader_workers, ignore_stop_signals)

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Rows of some held-out samples, on rank 0. Collective."""
        num_images = self.config.monitor.num_images
        entries = spread_over(self.samples.entries("val"), num_images) or self.entries[:num_images]
        rows = [self._row(model, collated(self.source, [entry])) for entry in entries]
        return {f"samples/{self._name_of_rows()}": torch.cat(rows)} if self.group.ranks.is_first else {}

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """Rows of mask and frame of the first samples of the run; local."""
        chosen = self.order.cell(0)[: self.config.monitor.num_images]
        rows = []
        for index in chosen:
            batch = collated(self.source, [self.entries[index]])
            rows.append(torch.cat([shown_mask(batch), shown_frame(batch)], dim=1))
        return {"first_batch/mask_frame": torch.cat(rows)}

    def describe(self) -> dict[str, float]:
        """Nothing to tell."""
        return {}

    def drawn_sigmas(self) -> torch.Tensor:
        """No noise levels."""
        return torch.empty(0)


def shown_mask(batch: dict[str, Any]) -> torch.Tensor:
    """The nerve mask of the first sample, uint8 (H, W)."""
    mask: torch.Tensor = batch["nerve_masks"][0].to(torch.uint8) * 255
    return mask


def shown_frame(batch: dict[str, Any]) -> torch.Tensor:
    """The frame of the first sample, uint8 (H, W)."""
    frame: torch.Tensor = ((batch["images"][0, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return frame
