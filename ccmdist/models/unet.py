"""The U-Net that segments nerves, and whose levels MDF-MLLM reads: MONAI's BasicUNet with its levels in reach.

It has no buffers: checkpoints hold parameters alone.

Shape suffixes: B samples, C channels, H W rows and columns; a level k has C_k channels and 1 / 2^k of the image's edge.
"""

from collections.abc import Sequence
from typing import Final

import torch
from monai.networks.nets import BasicUNet
from torch import Tensor

from ccmdist.config.objectives.mdf_mllm import UnetSettings

NUM_LEVELS: Final = 5
"""Of the image's own size, and of half of it, and so on; the first is read by nobody."""


class LevelUnet(BasicUNet):
    """Encoder and decoder of a BasicUNet, to be called by turns."""

    def levels(self, images_B1HW: Tensor) -> list[Tensor]:
        """Features (B, C_k, H / 2^k, W / 2^k) of the levels 0 to 4."""
        found = [self.conv_0(images_B1HW)]
        for down in (self.down_1, self.down_2, self.down_3, self.down_4):
            found.append(down(found[-1]))
        return found

    def decoded(self, levels: Sequence[Tensor]) -> Tensor:
        """Logits of nerve, (B, 1, H, W), of the features of all levels."""
        x0, x1, x2, x3, x = levels
        for up, skipped in ((self.upcat_4, x3), (self.upcat_3, x2), (self.upcat_2, x1), (self.upcat_1, x0)):
            x = up(x, skipped)
        logits: Tensor = self.final_conv(x)
        return logits

    def forward(self, x: Tensor) -> Tensor:
        """Logits of nerve, (B, 1, H, W), of images (B, 1, H, W) in [-1, 1]."""
        return self.decoded(self.levels(x))


def make_unet(settings: UnetSettings, seed: int) -> LevelUnet:
    """The U-Net with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LevelUnet(2, 1, 1, settings.channels, norm=("instance", {"affine": True}))
