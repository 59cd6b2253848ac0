"""Nerve masks of frames, by a U-Net from scratch.

Shape suffixes: B samples, H W rows and columns.
"""

from typing import Any, Final

import torch
from monai.losses import DiceCELoss
from torch import Tensor

from ccmdist.ccm.overlap import centreline_dice
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.mdf_mllm import SegmentSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.stream import collated
from ccmdist.models.unet import make_unet
from ccmdist.train.objectives.objective import Batch
from ccmdist.train.objectives.one_network import OneNetwork
from ccmdist.train.objectives.ordered_samples import shared_by_ranks, spread_over
from ccmdist.train.objectives.pixel_samples import NO_BASE, PixelSamples, shown_frame, shown_mask

HELD_OUT: Final = ("mean", "dice", "cl_dice")
SMOOTH: Final = 1e-5
"""Of Dice's fraction: a crop without nerves counts as found when nothing is found."""


class SegmentObjective(OneNetwork, PixelSamples):
    """Learns masks by Dice and cross-entropy."""

    figures = ()
    set_name = "unet"
    columns = "mask_frame_found"

    def __init__(self, config: TrainConfig, group: ProcessGroup) -> None:
        """Look through the shards and plan the order; see :class:`PixelSamples`."""
        assert isinstance(config.objective, SegmentSettings), config.objective
        self.settings = config.objective
        super().__init__(config, group)
        self.base_digest = NO_BASE

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The U-Net, every weight of it trained; the engine cuts it over the ranks."""
        self.network = make_unet(self.settings, self.config.seed).to(self.group.device).train()
        return self.network

    def loss(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """Dice plus cross-entropy of the masks."""
        return mask_loss(model(batch["images"].to(self.group.device)), batch["nerve_masks"])

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Loss of held-out masks, Dice and clDice of those that are found. Collective."""
        entries = spread_over(self.samples.entries("val"), self.config.validation.num_samples)
        sums = [0.0] * len(HELD_OUT)
        for entry, weight in shared_by_ranks(entries, self.group):
            batch = collated(self.source, [entry])
            logits_B1HW = model(batch["images"].to(self.group.device))
            found, wanted = (logits_B1HW[0, 0] > 0).cpu().numpy(), batch["nerve_masks"][0].numpy()
            dice = (2 * (found & wanted).sum() + SMOOTH) / (found.sum() + wanted.sum() + SMOOTH)
            figures = (mask_loss(logits_B1HW, batch["nerve_masks"]), dice, centreline_dice(found, wanted))
            sums = [total + weight * float(figure) for total, figure in zip(sums, figures, strict=True)]
        if not entries:
            return {}
        return {name: total / len(entries) for name, total in zip(HELD_OUT, self.group.total(sums), strict=True)}

    def _shown(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        probability_HW = model(batch["images"].to(self.group.device))[0, 0].sigmoid().cpu()
        found = (probability_HW * 255).round().to(torch.uint8)
        return torch.cat([shown_mask(batch), shown_frame(batch), found], dim=1)


def mask_loss(logits_B1HW: Tensor, nerve_masks_BHW: Tensor) -> Tensor:
    """Dice plus cross-entropy, the mean over the samples."""
    wanted_B1HW = nerve_masks_BHW[:, None].to(logits_B1HW)
    loss: Tensor = DiceCELoss(sigmoid=True, smooth_nr=SMOOTH, smooth_dr=SMOOTH)(logits_B1HW, wanted_B1HW)
    return loss
