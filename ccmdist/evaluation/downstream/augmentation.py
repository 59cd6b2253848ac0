"""Classical augmentation of a batch: flips, small rotations, shifts and scales, brightness, noise; by MONAI."""

from typing import Final

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandAdjustContrastd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    ScaleIntensityRanged,
)
from torch import Tensor

BOTH: Final = ("image", "mask")
ROTATION_RAD: Final = 0.26
"""15 degrees."""
SHIFT: Final = 0.06
"""Of the edge, at most."""
SCALE: Final = 0.1
NOISE: Final = 0.03
"""SD, in units of the grey range."""


def transforms(size_px: int) -> Compose:
    """What is done to a mapping of one image (1, H, W) in 0..255 and its mask; a mask stays two-valued."""
    shift = SHIFT * size_px
    return Compose(
        [
            ScaleIntensityRanged("image", 0, 255, 0, 1),
            RandFlipd(BOTH, prob=0.5, spatial_axis=0),
            RandFlipd(BOTH, prob=0.5, spatial_axis=1),
            RandAffined(
                BOTH,
                prob=0.8,
                rotate_range=ROTATION_RAD,
                translate_range=shift,
                scale_range=SCALE,
                mode=("bilinear", "nearest"),
                padding_mode="reflection",
            ),
            RandAdjustContrastd("image", prob=0.5, gamma=(0.8, 1.25)),
            RandGaussianNoised("image", prob=0.5, std=NOISE),
            ScaleIntensityRanged("image", 0, 1, 0, 255),
        ]
    )


def augmented(images: Tensor, masks: Tensor, chain: Compose, seed: int) -> tuple[Tensor, Tensor]:
    """A batch of images and masks (N, H, W), augmented as the seed draws it and nothing else.

    Args:
        images: uint8, on the CPU.
        masks: bool.
        chain: As :func:`transforms` makes it.
        seed: Of this batch.
    """
    chain.set_random_state(seed=seed % np.iinfo(np.uint32).max)
    done = [chain({"image": i[None].float(), "mask": m[None].float()}) for i, m in zip(images, masks, strict=True)]
    return (
        torch.stack([one["image"].as_tensor()[0] for one in done]),
        torch.stack([one["mask"].as_tensor()[0] > 0.5 for one in done]),
    )
