"""Fits the tiny MMDiT to phantoms by rectified flow, as a stand-in for a pretrained editing model.

It learns to draw a frame from nothing, to restore it from a coarse copy, and to redraw it from a sketch of it, in
black on white: so it looks at the same place of the condition image, as an editing model does. It never sees
a nerve mask; that is left to an adapter.

Shape suffixes: B samples, S packed latent tokens, C channels, L text tokens, D text width, H W pixels.
"""

import copy
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from diffusers import QwenImageTransformer2DModel
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import NEGATIVE_PROMPT, prompt
from ccmdist.console import log
from ccmdist.diffusion import flow
from ccmdist.diffusion.seeding import generator
from ccmdist.models import mmdit
from ccmdist.models.encoders import LatentCodec, PromptEncoder
from ccmdist.models.make import make_transformer
from ccmdist.models.sizes import NOISE_SCHEDULE, SIZES
from ccmdist.train.fit.optimizer import FitOptimizer
from ccmdist.train.fit.phantoms import SIZE_PX, Frames
from ccmdist.train.optim import update_average

KINDS: Final = {"blank": 0.2, "coarse": 0.2, "sketch": 0.6}
"""Kinds of condition images, and of how many samples they are."""
NEGATIVE_PROMPT_SHARE: Final = 0.1
"""Of steps that see the negative prompt, for classifier-free guidance."""
COARSE_PX: Final = 4
"""Edge of the squares of a frame that become one value of its coarse copy."""
STROKE_SIGMAS_PX: Final = (1.5, 6.0)
STROKE_CONTRAST: Final = 1.0
"""A stroke is where a smooth copy exceeds a smoother one by so many standard deviations of their difference."""
NUM_SHOWN: Final = 8
"""Images that each prompt is encoded with."""
SIGMAS: Final = (0.3, 0.5, 0.7, 0.9)
"""Of the held-out losses that are told."""
MAX_DECAY: Final = 0.99
TOKEN_HW: Final = (SIZE_PX // 16, SIZE_PX // 16)
ZERO_AT_FIRST: Final = ("img_mod.1", "txt_mod.1", "norm_out.linear", "proj_out")
NUM_FAST_DIMS: Final = 4
"""Two pairs of dimensions per axis."""
FAST_BIAS: Final = 4.0
"""Several times what the weights add at first."""
LOG_EVERY: Final = 50


@dataclass(frozen=True)
class MmditFit:
    """Lengths of the fit."""

    num_frames: int = 600
    num_steps: int = 900
    batch_size: int = 16
    lr: float = 0.02


@dataclass(frozen=True)
class Samples:
    """What the fit learns from, encoded once.

    Attributes:
        images: Packed latents of the frames, (N, S, C).
        conditions: Kind -> packed latents of condition images of the frames, (N, S, C).
        prompt_embeds: Group, or the negative prompt -> embeddings with several images, (NUM_SHOWN, L, D).
        groups: Of the frames.
    """

    images: Tensor
    conditions: dict[str, Tensor]
    prompt_embeds: dict[str, Tensor]
    groups: tuple[str, ...]

    def batch(self, size: int, source: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Targets and conditions, both (B, S, C), and embeddings (B, L, D), drawn at random."""
        chosen = torch.randint(len(self.images), (size,), generator=source)
        kinds = torch.multinomial(torch.tensor([*KINDS.values()]), size, replacement=True, generator=source).tolist()
        names = [[*KINDS][kind] for kind in kinds]
        conditions = [self.conditions[kind][index] for kind, index in zip(names, chosen.tolist(), strict=True)]
        is_negative = float(torch.rand((), generator=source)) < NEGATIVE_PROMPT_SHARE
        prompts = [NEGATIVE_PROMPT if is_negative else self.groups[index] for index in chosen.tolist()]
        shown = torch.randint(NUM_SHOWN, (size,), generator=source).tolist()
        embeds = [self.prompt_embeds[name][index] for name, index in zip(prompts, shown, strict=True)]
        return self.images[chosen], torch.stack(conditions), torch.stack(embeds)


def encoded(frames: Frames, codec: LatentCodec, encoder: PromptEncoder, seed: int) -> Samples:
    """Latents of frames and of their condition images, and embeddings of the prompts with images of no meaning."""
    shown = _blobs(seed)
    texts = {group: prompt(group, {}) for group in CLINICAL_GROUPS} | {NEGATIVE_PROMPT: NEGATIVE_PROMPT}
    images = _packed(codec, frames.images)
    conditions = {
        "blank": _packed(codec, np.zeros_like(frames.images[:1])).expand_as(images),
        "coarse": _packed(codec, np.stack([coarse(image) for image in frames.images])),
        "sketch": _packed(codec, np.stack([sketch(image) for image in frames.images])),
    }
    prompt_embeds = {name: torch.stack(encoder.encode([text] * NUM_SHOWN, shown)) for name, text in texts.items()}
    return Samples(images, conditions, prompt_embeds, frames.clinical_groups)


def fit_mmdit(samples: Samples, settings: MmditFit, seed: int) -> QwenImageTransformer2DModel:
    """A tiny MMDiT that draws phantoms.

    Returns:
        The average of the last weights in float32, with values that bf16 holds exactly.
    """
    model = _started(seed)
    optimizer, average = (
        FitOptimizer(model, settings.lr, settings.num_steps),
        copy.deepcopy(model).requires_grad_(False),
    )
    mean_loss = math.nan
    for step in range(settings.num_steps):
        loss = optimizer.step(flow_loss(model, samples, settings.batch_size, generator(seed, "fit mmdit", step)))
        # Short at first, so that the untrained weights are soon forgotten.
        update_average(average.parameters(), model.parameters(), min(MAX_DECAY, step / (step + 10)))
        mean_loss = loss if step == 0 else 0.98 * mean_loss + 0.02 * loss
        if (step + 1) % LOG_EVERY == 0:
            log.info("transformer: step %d of %d, loss %.4f", step + 1, settings.num_steps, mean_loss)
    for parameter in average.parameters():
        parameter.copy_(parameter.bfloat16())
    return average.eval()


def flow_loss(model: nn.Module, samples: Samples, batch_size: int, source: torch.Generator) -> Tensor:
    """Mean squared error of the predicted velocity, for a batch drawn from ``source``."""
    x_BSC, conditions_BSC, embeds_BLD = samples.batch(batch_size, source)
    grid = flow.training_sigmas(flow.resolution_shift(TOKEN_HW[0] * TOKEN_HW[1], NOISE_SCHEDULE))
    sigma_B = torch.stack([flow.draw_sigma("logit_normal", grid, source) for _ in range(batch_size)])
    noise_BSC = torch.randn(x_BSC.shape, generator=source)
    noisy_BSC = flow.interpolate(x_BSC, noise_BSC, sigma_B)
    predicted_BSC = mmdit.velocity(model, noisy_BSC, conditions_BSC, embeds_BLD, sigma_B, TOKEN_HW, TOKEN_HW)
    return (predicted_BSC - flow.velocity_target(x_BSC, noise_BSC)).square().mean()


@torch.no_grad()
def held_out_losses(model: nn.Module, samples: Samples) -> dict[str, float]:
    """Mean squared error of the velocity on all samples at each level of SIGMAS, by kind of condition image."""
    source = generator(0, "fit mmdit", "held out")
    x_BSC = samples.images
    noise_BSC = torch.randn(x_BSC.shape, generator=source)
    embeds_BLD = torch.stack([samples.prompt_embeds[group][0] for group in samples.groups])
    losses = {}
    for kind, conditions_BSC in samples.conditions.items():
        for sigma in SIGMAS:
            sigma_B = torch.full((len(x_BSC),), sigma)
            noisy_BSC = flow.interpolate(x_BSC, noise_BSC, sigma_B)
            predicted_BSC = mmdit.velocity(model, noisy_BSC, conditions_BSC, embeds_BLD, sigma_B, TOKEN_HW, TOKEN_HW)
            error = predicted_BSC - flow.velocity_target(x_BSC, noise_BSC)
            losses[f"loss_{kind}_sigma_{sigma:g}"] = round(float(error.square().mean()), 4)
    return losses


def coarse(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A grey image (H, W) without its fine detail."""
    size = (image.shape[1], image.shape[0])
    small = Image.fromarray(image).resize((size[0] // COARSE_PX, size[1] // COARSE_PX), Image.Resampling.BOX)
    return np.asarray(small.resize(size, Image.Resampling.BICUBIC))


def sketch(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A grey image (H, W) as black strokes on white, where it is brighter than its surroundings."""
    fine, wide = (gaussian_filter(image.astype(np.float32), sigma) for sigma in STROKE_SIGMAS_PX)
    difference = fine - wide
    return np.where(difference > STROKE_CONTRAST * difference.std(), 0, 255).astype(np.uint8)


def _started(seed: int) -> QwenImageTransformer2DModel:
    """A model of which every block does nothing yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_transformer(SIZES["tiny"], "2509")
    for name, parameter in model.named_parameters():
        if any(part in name for part in ZERO_AT_FIRST):
            nn.init.zeros_(parameter)
    for block in model.transformer_blocks:
        _look_at_same_place(block.attn, model.config.axes_dims_rope)
    return model.train()


@torch.no_grad()
def _look_at_same_place(attention: nn.Module, axes_dims: tuple[int, int, int]) -> None:
    """Let the first head prefer tokens of the query's own row and column, in the target and in the condition image.

    Queries and keys get a constant part in the dimensions that the position turns fastest. Left to itself, the model
    finds out only after hundreds of steps that the condition image lies in register with the target.
    """
    frame, rows, _ = axes_dims
    for first in (frame, frame + rows):
        for linear in (attention.to_q, attention.to_k):
            linear.bias[first : first + NUM_FAST_DIMS] = FAST_BIAS


def _packed(codec: LatentCodec, images_BHW: NDArray[np.uint8]) -> Tensor:
    parts = np.array_split(images_BHW, -(-len(images_BHW) // 8))
    return torch.cat([flow.pack_latents(codec.encode(part)) for part in parts])


def _blobs(seed: int) -> list[NDArray[np.uint8]]:
    """Random shapes; an embedding depends on the image, but these say nothing about nerves."""
    rng = np.random.default_rng([seed, NUM_SHOWN])
    smooth = [gaussian_filter(rng.standard_normal((SIZE_PX, SIZE_PX)), rng.uniform(2, 20)) for _ in range(NUM_SHOWN)]
    return [np.uint8(255) * (field > np.quantile(field, rng.uniform(0.3, 1.0))) for field in smooth]
