"""Euler sampling of the flow with true classifier-free guidance, for a batch of images at once.

Stock pipelines refuse batches and latents as condition, and with cached embeddings they may switch guidance off
without a word; here both passes are asserted.

Shape suffixes: B samples, S packed latent tokens, C channels.
"""

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class Velocity(Protocol):
    """The model's prediction of noise - x for the target tokens."""

    def __call__(self, latents_BSC: Tensor, sigma_B: Tensor, conditional: bool) -> Tensor:
        """Predict with the prompt (``conditional``) or with the negative prompt."""
        ...


@torch.no_grad()
def sample(velocity: Velocity, noise_BSC: Tensor, sigmas: Tensor, guidance_scale: float) -> Tensor:
    """Packed latents of images, drawn from noise.

    Args:
        velocity: The model.
        noise_BSC: Standard normal noise.
        sigmas: Descending noise levels that end with 0, from :func:`ccmdist.diffusion.flow.sampling_sigmas`.
        guidance_scale: 1 for no second pass.

    Source: diffusers' QwenImageEditPlusPipeline; its guidance keeps the norm of the conditional prediction, per token.
    """
    latents_BSC = noise_BSC.float()
    passes = 0
    for sigma, following in pairwise(sigmas):
        sigma_B = sigma.expand(len(noise_BSC)).to(noise_BSC.device)
        predicted_BSC = velocity(latents_BSC, sigma_B, True).float()
        passes += 1
        if guidance_scale > 1:
            unconditional_BSC = velocity(latents_BSC, sigma_B, False).float()
            predicted_BSC = guided(predicted_BSC, unconditional_BSC, guidance_scale)
            passes += 1
        latents_BSC = latents_BSC + (following - sigma).to(latents_BSC) * predicted_BSC
    expected = (len(sigmas) - 1) * (2 if guidance_scale > 1 else 1)
    assert passes == expected, f"guidance {guidance_scale} needs {expected} passes, {passes} ran"
    return latents_BSC


def guided(conditional_BSC: Tensor, unconditional_BSC: Tensor, guidance_scale: float) -> Tensor:
    """The guided prediction, rescaled per token to the norm of the conditional one."""
    combined_BSC = unconditional_BSC + guidance_scale * (conditional_BSC - unconditional_BSC)
    norm_BS1 = conditional_BSC.norm(dim=-1, keepdim=True)
    # The floor changes nothing but 0 / 0: a model that predicts exactly nothing for a token.
    return combined_BSC * (norm_BS1 / combined_BSC.norm(dim=-1, keepdim=True).clamp_min(1e-30))
