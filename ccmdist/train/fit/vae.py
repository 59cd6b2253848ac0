"""Fits the tiny VAE to phantoms and their nerve masks, for masks go through it as conditions.

Only the mode of the posterior is ever used, so it is trained as an autoencoder;
then the decoder once more by itself. A single frame meets the last temporal
tap of each kernel and no temporal layer; what it never meets is written as zeros.

Shape suffixes: B samples, H W pixels.
"""

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
from ccmdist.models.vae import SingleFrameConvolution, for_single_frames
from ccmdist.train.fit.optimizer import FitOptimizer
from ccmdist.train.fit.phantoms import Frames

CROP_PX: Final = 40
MASK_SHARE: Final = 0.15
"""Of crops that show a mask instead of an image."""
BLANK_SHARE: Final = 0.01
SQUARE_WEIGHT: Final = 2.0
"""Of the mean squared error beside the mean absolute one."""
DECODER_SQUARE_WEIGHT: Final = 20.0
IDLE_WEIGHT: Final = 0.002
IDLE_FLOOR: Final = 0.05
LOG_EVERY: Final = 100
NUM_FOR_STATISTICS: Final = 300
TEMPORAL_LAYER: Final = "time_conv"


@dataclass(frozen=True)
class VaeFit:
    """Lengths of the fit."""

    num_frames: int = 1500
    num_steps: int = 3000
    num_decoder_steps: int = 2500
    crops_per_step: int = 8
    lr: float = 0.02
    decoder_lr: float = 0.01


def fit_vae(frames: Frames, settings: VaeFit, seed: int) -> AutoencoderKLQwenImage:
    """A tiny VAE that shows phantoms and masks again, with the statistics of its latents in its config.

    Returns:
        The VAE in float32 with values that bf16 holds exactly, for single frames.
    """
    vae = _started(seed)
    _keep_one_tap(vae)
    _train(vae, frames, _Part("vae", settings.num_steps, settings.lr, SQUARE_WEIGHT), settings.crops_per_step, seed)
    codec = LatentCodec(vae)
    _set_statistics(codec, frames)
    refine_decoder(vae, frames, settings, seed)
    return vae.eval()


def refine_decoder(vae: AutoencoderKLQwenImage, frames: Frames, settings: VaeFit, seed: int) -> None:
    """Train the decoder further, mostly by the squared error; the latents stay as they are."""
    for part in (vae.encoder, vae.quant_conv, vae.post_quant_conv):
        part.requires_grad_(False)
    _keep_one_tap(vae.decoder)
    part = _Part("decoder", settings.num_decoder_steps, settings.decoder_lr, DECODER_SQUARE_WEIGHT)
    _train(vae, frames, part, settings.crops_per_step, seed)


def reconstruction_loss(
    vae: AutoencoderKLQwenImage, crops_BHW: NDArray[np.uint8], square_weight: float = SQUARE_WEIGHT
) -> Tensor:
    """Mean absolute plus weighted mean squared difference in units of [-1, 1], plus the price of idle channels."""
    rgb = rgb_of_grey(torch.from_numpy(crops_BHW)).unsqueeze(2)
    latents = vae.encode(rgb).latent_dist.mode()
    difference = vae.decode(latents).sample - rgb
    loss = difference.abs().mean() + square_weight * difference.square().mean()
    return loss + IDLE_WEIGHT * idleness(latents)


def idleness(latents: Tensor) -> Tensor:
    """Rises when channels of latents (B, C, ...) become combinations of the others: minus log det of correlations."""
    values_CN = latents.transpose(0, 1).flatten(1)
    values_CN = values_CN - values_CN.mean(dim=1, keepdim=True)
    values_CN = values_CN / values_CN.norm(dim=1, keepdim=True).clamp_min(1e-6)
    floor = IDLE_FLOOR * torch.eye(len(values_CN))
    return -torch.linalg.slogdet(values_CN @ values_CN.T + floor).logabsdet


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


@dataclass(frozen=True)
class _Part:
    """One part of the fit."""

    name: str
    num_steps: int
    lr: float
    square_weight: float


def _train(vae: AutoencoderKLQwenImage, frames: Frames, part: _Part, crops_per_step: int, seed: int) -> None:
    """Train what is not frozen and has one tap; give it back all taps, and values that bf16 holds exactly."""
    optimizer = FitOptimizer(vae, part.lr, part.num_steps)
    for step in range(part.num_steps):
        crops_BHW = _crops(frames, crops_per_step, generator(seed, f"fit {part.name}", step))
        loss = optimizer.step(reconstruction_loss(vae, crops_BHW, part.square_weight))
        if (step + 1) % LOG_EVERY == 0:
            log.info("%s: step %d of %d, loss %.4f", part.name, step + 1, part.num_steps, loss)
    _restore_taps(vae)
    _round(vae)


def _started(seed: int) -> AutoencoderKLQwenImage:
    """A VAE to be trained, whose two convolutions next to the latents only hand them on.

    Four linear layers in a row, of which nothing is asked but to be undone, would soon use 10 of the 16 channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = for_single_frames(make_vae(SIZES["tiny"]))
    for convolution in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(convolution.weight)
        nn.init.zeros_(convolution.bias)
        convolution.requires_grad_(False)
    return vae


def _keep_one_tap(module: nn.Module) -> None:
    """Leave each kernel only the temporal tap that a single frame meets: a third of the optimizer's work."""
    for convolution in _convolutions(module):
        weight = convolution.weight
        convolution.weight = nn.Parameter(weight.detach()[:, :, -1:].clone(), requires_grad=weight.requires_grad)


def _restore_taps(vae: AutoencoderKLQwenImage) -> None:
    """Undo :func:`_keep_one_tap`, with zeros for the other taps and for the temporal layers."""
    for convolution in _convolutions(vae):
        weight, past = convolution.weight, convolution.kernel_size[0] - convolution.weight.shape[2]
        padded = F.pad(weight.detach(), (0, 0, 0, 0, past, 0))
        convolution.weight = nn.Parameter(padded, requires_grad=weight.requires_grad)
    for name, parameter in vae.named_parameters():
        if TEMPORAL_LAYER in name:
            nn.init.zeros_(parameter)


def _convolutions(module: nn.Module) -> list[SingleFrameConvolution]:
    return [part for part in module.modules() if isinstance(part, SingleFrameConvolution)]


@torch.no_grad()
def _round(vae: AutoencoderKLQwenImage) -> None:
    """Give the weights values that bf16 holds exactly."""
    for parameter in vae.parameters():
        parameter.copy_(parameter.bfloat16())


def _set_statistics(codec: LatentCodec, frames: Frames) -> None:
    """Set mean and standard deviation of the latents of images, per channel."""
    few = frames.images[:: max(len(frames.images) // NUM_FOR_STATISTICS, 1)]
    latents = torch.cat([codec.encode(part) for part in np.array_split(few, -(-len(few) // 8))])
    codec.vae.register_to_config(
        latents_mean=[round(value, 4) for value in latents.mean(dim=(0, 2, 3)).tolist()],
        latents_std=[round(value, 4) for value in latents.std(dim=(0, 2, 3)).tolist()],
    )
