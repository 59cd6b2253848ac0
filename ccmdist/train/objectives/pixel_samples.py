"""What objectives that learn on the pixels of frames and masks have in common: samples, pictures, figures of a loss.

Shape suffixes: H W rows and columns.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Final

import numpy as np
import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.stream import collated
from ccmdist.data.triple import Triple
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.ordered_samples import OrderedSamples, spread_over

NO_BASE: Final = "none"
"""Identity of frozen weights where there are none."""


class PixelSource:
    """Images and masks of shards as tensors."""

    def __init__(self, samples: ShardSamples) -> None:
        """Read ``samples`` when they are asked for."""
        self._samples = samples

    def read(self, entry: CacheEntry) -> dict[str, torch.Tensor]:
        """``images`` (1, H, W), float32 in [-1, 1], and ``nerve_masks`` (H, W), bool.

        Raises:
            ShardError: If the sample has changed since the run began.
        """
        return pixels_of(self._samples.triple(entry))


class PixelSamples(OrderedSamples, ABC):
    """The samples of a shard set, in the order of the run. Neither the cache nor the model folder is needed."""

    figures: ClassVar[tuple[str, ...]]
    """Names of what is noted in each step, to be told as means."""
    columns: str
    """What a row of a picture shows."""

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards and plan the order.

        Raises:
            ShardError: If a tar of the shard set is not the one that its manifest names.
            ConfigError: If there are too few samples, or the batch does not divide over the ranks.
        """
        self.samples = ShardSamples(config.data, ("train", "val"))
        self.data_digest = self.samples.digest
        super().__init__(config, group, PixelSource(self.samples), self.samples.entries("train"))
        self._noted: dict[str, list[torch.Tensor]] = {name: [] for name in self.figures}

    @abstractmethod
    def _shown(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """A row of a picture, of one sample, uint8 (H, W). Collective."""

    def describe(self) -> dict[str, float]:
        """Means since the last call of what was noted."""
        noted, self._noted = self._noted, {name: [] for name in self.figures}
        sums = self.group.total([float(sum(values)) for values in noted.values()])
        counts = self.group.total([float(len(values)) for values in noted.values()])
        return {name: total / count for name, total, count in zip(noted, sums, counts, strict=True) if count}

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Rows of some held-out samples, on rank 0. Collective."""
        num_images = self.config.monitor.num_images
        entries = spread_over(self.samples.entries("val"), num_images) or self.entries[:num_images]
        rows = [self._shown(model, collated(self.source, [entry])) for entry in entries]
        return {f"samples/{self.columns}": torch.cat(rows)} if self.group.ranks.is_first else {}

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """Rows of mask and frame of the first samples of the run; local."""
        chosen = self.order.cell(0)[: self.config.monitor.num_images]
        batches = [collated(self.source, [self.entries[index]]) for index in chosen]
        rows = [torch.cat([shown_mask(batch), shown_frame(batch)], dim=1) for batch in batches]
        return {"first_batch/mask_target": torch.cat(rows)}

    def drawn_sigmas(self) -> torch.Tensor:
        """No noise levels."""
        return torch.empty(0)

    def _note(self, name: str, value: torch.Tensor) -> None:
        self._noted[name].append(value.detach())  # looked at when it is told: the host never waits for it here


def pixels_of(triple: Triple) -> dict[str, torch.Tensor]:
    """``images`` (1, H, W), float32 in [-1, 1], and ``nerve_masks`` (H, W), bool."""
    image = torch.from_numpy(triple.image.astype(np.float32) / 127.5 - 1)
    return {"images": image[None], "nerve_masks": torch.from_numpy(triple.nerve_mask.copy())}


def shown_mask(batch: Batch) -> torch.Tensor:
    """The nerve mask of the first sample, uint8 (H, W)."""
    mask: torch.Tensor = batch["nerve_masks"][0].to(torch.uint8) * 255
    return mask


def shown_frame(batch: Batch) -> torch.Tensor:
    """The frame of the first sample, uint8 (H, W)."""
    return as_grey(batch["images"][0, 0])


def as_grey(image_HW: torch.Tensor) -> torch.Tensor:
    """An image in [-1, 1] as it is shown, uint8 (H, W)."""
    return ((image_HW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
