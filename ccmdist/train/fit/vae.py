"""Fits the tiny VAE to phantoms and their nerve masks, for masks go through it as conditions.

Only the mode of the posterior is ever used, so it is trained as an autoencoder. A single frame meets the last temporal
tap of each kernel and no temporal layer; what it never meets is written as zeros.

Shape suffixes: B samples, H W pixels.
"""

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from numpy.typing import NDArray
from torch import Tensor, nn

from ccmdist.console import log
from ccmdist.diffusion.seeding import generator
from ccmdist.models.encoders import LatentCodec, rgb_of_grey
from ccmdist.models.make import make_vae
from ccmdist.models.sizes import SIZES
from ccmdist.models.vae import SingleFrameConvolution
from ccmdist.train.fit.optimizer import FitOptimizer
from ccmdist.train.fit.phantoms import Frames

CROP_PX: Final = 40
MASK_SHARE: Final = 0.15
"""Of crops that show a mask instead of an image."""
BLANK_SHARE: Final = 0.01
SQUARE_WEIGHT: Final = 2.0
"""Of the mean squared error beside the mean absolute one."""
LOG_EVERY: Final = 100
NUM_FOR_STATISTICS: Final = 300
TEMPORAL_LAYER: Final = "time_conv"


@dataclass(frozen=True)
class VaeFit:
    """Lengths of the fit."""

    num_frames: int = 1500
    num_steps: int = 3000
    crops_per_step: int = 8
    lr: float = 0.02


def fit_vae(frames: Frames, settings: VaeFit, seed: int) -> AutoencoderKLQwenImage:
    """A tiny VAE that shows phantoms and masks again, with the statistics of its latents in its config.

    Returns:
        The VAE in float32 with values that bf16 holds exactly, for single frames.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        codec = LatentCodec(make_vae(SIZES["tiny"]))
    _keep_one_tap(codec.vae)
    optimizer = FitOptimizer(codec.vae, settings.lr, settings.num_steps)
    mean_loss = math.nan
    for step in range(settings.num_steps):
        crops_BHW = _crops(frames, settings.crops_per_step, generator(seed, "fit vae", step))
        loss = optimizer.step(reconstruction_loss(codec.vae, crops_BHW))
        mean_loss = loss if step == 0 else 0.98 * mean_loss + 0.02 * loss
        if (step + 1) % LOG_EVERY == 0:
            log.info("vae: step %d of %d, loss %.4f", step + 1, settings.num_steps, mean_loss)
    return _finished(codec, frames)


def reconstruction_loss(vae: AutoencoderKLQwenImage, crops_BHW: NDArray[np.uint8]) -> Tensor:
    """Mean absolute plus weighted mean squared difference of the reconstruction, in units of [-1, 1]."""
    rgb = rgb_of_grey(torch.from_numpy(crops_BHW)).unsqueeze(2)
    difference = vae.decode(vae.encode(rgb).latent_dist.mode()).sample - rgb
    return difference.abs().mean() + SQUARE_WEIGHT * difference.square().mean()


def correlation(codec: LatentCodec, images_BHW: NDArray[np.uint8]) -> tuple[float, float]:
    """Pearson's r of images with their reconstructions: over all pixels of all, and the median of one image each."""
    shown_BHW = np.concatenate(
        [codec.decode(codec.encode(part)) for part in np.array_split(images_BHW, len(images_BHW))]
    )
    each = [float(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in zip(images_BHW, shown_BHW, strict=True)]
    return float(np.corrcoef(images_BHW.ravel(), shown_BHW.ravel())[0, 1]), float(np.median(each))


def _crops(frames: Frames, count: int, source: torch.Generator) -> NDArray[np.uint8]:
    """Random crops of images and masks, randomly flipped, (B, H, W)."""
    crops = np.zeros((count, CROP_PX, CROP_PX), np.uint8)
    for crop in crops:
        kind, *places = torch.rand(6, generator=source).tolist()
        if kind < BLANK_SHARE:
            continue
        pool = frames.nerve_masks if kind < BLANK_SHARE + MASK_SHARE else frames.images
        frame = pool[int(places[0] * len(pool))]
        row, column = (int(place * (edge - CROP_PX + 1)) for place, edge in zip(places[1:3], frame.shape, strict=True))
        flips = tuple(-1 if place < 0.5 else 1 for place in places[3:])
        crop[:] = frame[row : row + CROP_PX, column : column + CROP_PX][:: flips[0], :: flips[1]]
    return crops


def _keep_one_tap(vae: AutoencoderKLQwenImage) -> None:
    """Leave each kernel only the temporal tap that a single frame meets: a third of the optimizer's work."""
    for module in _convolutions(vae):
        module.weight = nn.Parameter(module.weight.detach()[:, :, -1:].clone())


def _restore_taps(vae: AutoencoderKLQwenImage) -> None:
    """Undo :func:`_keep_one_tap`, with zeros for the other taps and for the temporal layers."""
    for module in _convolutions(vae):
        past = module.kernel_size[0] - module.weight.shape[2]
        module.weight = nn.Parameter(F.pad(module.weight.detach(), (0, 0, 0, 0, past, 0)))
    for name, parameter in vae.named_parameters():
        if TEMPORAL_LAYER in name:
            parameter.zero_()


def _convolutions(vae: AutoencoderKLQwenImage) -> list[SingleFrameConvolution]:
    return [module for module in vae.modules() if isinstance(module, SingleFrameConvolution)]


@torch.no_grad()
def _finished(codec: LatentCodec, frames: Frames) -> AutoencoderKLQwenImage:
    """All taps, values rounded to bf16, and the statistics of the latents of images."""
    vae = codec.vae.eval()
    _restore_taps(vae)
    for parameter in vae.parameters():
        parameter.copy_(parameter.bfloat16())
    few = frames.images[:: max(len(frames.images) // NUM_FOR_STATISTICS, 1)]
    latents = torch.cat([codec.encode(part) for part in np.array_split(few, -(-len(few) // 8))])
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in latents.mean(dim=(0, 2, 3)).tolist()],
        latents_std=[round(value, 4) for value in latents.std(dim=(0, 2, 3)).tolist()],
    )
    return vae
