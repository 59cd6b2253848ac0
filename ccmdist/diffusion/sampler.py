"""Euler sampling of the flow with true classifier-free guidance, for a batch of images at once.

Stock pipelines refuse batches and latents as condition, and with cached embeddings they may switch guidance off
without a word; here both predictions are asserted.

Shape suffixes: B samples, S packed latent tokens, C channels.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class Velocity(Protocol):
    """The model's predictions of noise - x for the target tokens."""

    def __call__(self, latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
        """Predict with the prompt and, where there is to be guidance, with the negative prompt."""
        ...


@torch.no_grad()
def sample(velocity: Velocity, noise_BSC: Tensor, sigmas: Tensor, guidance_scale: float) -> Tensor:
    """Packed latents of images, drawn from noise.

    Args:
        velocity: The model.
        noise_BSC: Standard normal noise.
        sigmas: Descending noise levels that end with 0, from :func:`ccmdist.diffusion.flow.sampling_sigmas`.
        guidance_scale: 1 for none: ``velocity`` then has one prediction, else two.

    Source: diffusers' QwenImageEditPlusPipeline; its guidance keeps the norm of the conditional prediction, per token.
    """
    latents_BSC = noise_BSC.float()
    for sigma, following in pairwise(sigmas):
        predicted_BSC = _predicted(velocity, latents_BSC, sigma, guidance_scale)
        latents_BSC = latents_BSC + (following - sigma).to(latents_BSC) * predicted_BSC
    return latents_BSC


def _predicted(velocity: Velocity, latents_BSC: Tensor, sigma: Tensor, guidance_scale: float) -> Tensor:
    predictions = velocity(latents_BSC, sigma.expand(len(latents_BSC)).to(latents_BSC.device))
    expected = 2 if guidance_scale > 1 else 1
    assert len(predictions) == expected, (
        f"guidance {guidance_scale} needs {expected} predictions, got {len(predictions)}"
    )
    if guidance_scale > 1:
        conditional_BSC, unconditional_BSC = predictions
        return guided(conditional_BSC.float(), unconditional_BSC.float(), guidance_scale)
    return predictions[0].float()


def guided(conditional_BSC: Tensor, unconditional_BSC: Tensor, guidance_scale: float) -> Tensor:
    """The guided prediction, rescaled per token to the norm of the conditional one."""
    combined_BSC = unconditional_BSC + guidance_scale * (conditional_BSC - unconditional_BSC)
    norm_BS1 = conditional_BSC.norm(dim=-1, keepdim=True)
    # The floor changes nothing but 0 / 0: a model that predicts exactly nothing for a token.
    return combined_BSC * (norm_BS1 / combined_BSC.norm(dim=-1, keepdim=True).clamp_min(1e-30))
