"""Where a network that diagnoses looked in a few test images, as small pictures: saliency, and MDF-MLLM's attention.

Both say what an output depends on, not why, and not whether it is right.
"""

import base64
import io
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from ccmdist.evaluation.downstream.examples import Examples
from ccmdist.evaluation.downstream.networks import as_input, attended_by
from ccmdist.models.fusion import overlay

MAX_IMAGES: Final = 4
"""Of a cell: at most one of each label."""
PICTURE_PX: Final = 96
"""Largest edge of a picture."""
SALIENCY_GRID: Final = 32
"""Gradients of single pixels are noise to the eye: they are averaged over so many by so many patches."""
FRAME, SALIENCY, LEVEL = "frame", "saliency", "level "


@dataclass(frozen=True)
class Look:
    """Pictures of one test image."""

    index: int
    """Of the image among those that were tested."""
    pictures: dict[str, str]
    """"frame", "saliency" and, of MDF-MLLM, "level 1" and so on: grey PNGs in base64."""


def looks_of(network: nn.Module, test: Examples, device: torch.device) -> tuple[Look, ...]:
    """Pictures of the first test image of each label.

    Saliency is |d logit / d image| of the class that the network finds; attention is that of the last token to the
    tokens of each level that is fused, the mean over the heads.

    Args:
        network: Maps (N, 1, H, W) to logits (N, 3). Put into evaluation mode.
        test: What it was tested on.
        device: Where it is.
    """
    chosen = sorted(np.unique(test.labels, return_index=True)[1])[:MAX_IMAGES]
    # One by one, for gradients go back through all of a large language model's view of an image.
    return tuple(
        Look(int(index), _pictures(network.eval(), torch.from_numpy(test.images[index]), device)) for index in chosen
    )


def _pictures(network: nn.Module, image_HW: Tensor, device: torch.device) -> dict[str, str]:
    given = as_input(image_HW[None].to(device)).requires_grad_()
    logits = network(given)
    attended = attended_by(network)
    (gradient,) = torch.autograd.grad(logits.amax(), given)
    saliency = functional.adaptive_avg_pool2d(gradient.abs(), min(SALIENCY_GRID, len(image_HW)))
    weights = {SALIENCY: saliency.flatten(1)} | {LEVEL + name: attended[name] for name in sorted(attended)}
    return {FRAME: _png(_small(image_HW))} | {name: _lit(image_HW, weight[0]) for name, weight in weights.items()}


def _lit(image_HW: Tensor, weight_N: Tensor) -> str:
    return _png(_small(overlay(image_HW, weight_N.float().cpu())))


def _small(image_HW: Tensor) -> Tensor:
    edge = min(image_HW.shape[-1], PICTURE_PX)
    shown = functional.interpolate(image_HW[None, None].float(), (edge, edge), mode="bilinear", antialias=True)
    return shown[0, 0].round().clamp(0, 255).to(torch.uint8)


def _png(image_HW: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image_HW.numpy()).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
