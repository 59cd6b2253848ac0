"""Euler sampling of the flow with true classifier-free guidance, for a batch of images at once.

Stock pipelines refuse batches and latents as condition, and with cached embeddings they may switch guidance off
without a word; here both predictions are asserted.

Shape suffixes: B samples, S packed latent tokens, C channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from ccmdist.diffusion.flow import interpolate

Guidance = Literal["rescaled", "plain"]


class Velocity(Protocol):
    """The model's predictions of noise - x for the target tokens."""

    def __call__(self, latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
        """Predict with the prompt and, where there is to be guidance, with the negative prompt."""
        ...


@dataclass(frozen=True)
class Known:
    """What is known of images of which a part is to be filled.

    Attributes:
        latents_BSC: Clean packed latents; what they hold of open tokens is not looked at.
        is_open_BS: Boolean: the tokens that are drawn. All others are known.
    """

    latents_BSC: Tensor
    is_open_BS: Tensor

    def kept(self, latents_BSC: Tensor, noise_BSC: Tensor, sigma: Tensor) -> Tensor:
        """``latents_BSC`` with the known tokens as they are at the noise level ``sigma``, of shape ()."""
        at_level_BSC = interpolate(self.latents_BSC.float(), noise_BSC, sigma.expand(len(noise_BSC)))
        return torch.where(self.is_open_BS.unsqueeze(-1), latents_BSC, at_level_BSC)


@torch.no_grad()
def sample(
    velocity: Velocity,
    noise_BSC: Tensor,
    sigmas: Tensor,
    guidance_scale: float,
    known: Known | None = None,
    guidance: Guidance = "rescaled",
) -> Tensor:
    """Packed latents of images, drawn from noise.

    Args:
        velocity: The model.
        noise_BSC: Standard normal noise.
        sigmas: Descending noise levels that end with 0, from :func:`ccmdist.diffusion.flow.sampling_sigmas`.
        guidance_scale: 1 for none: ``velocity`` then has one prediction, else two.
        known: Tokens that are not drawn. Before each prediction they are what they are at its noise level, with the
            same noise throughout; at the end they are exactly the given latents.
        guidance: How two predictions are put together.

    Source: diffusers' QwenImageEditPlusPipeline; its guidance keeps the norm of the conditional prediction, per token.
    What is known is kept as in Lugmayr et al. 2022 (arXiv:2201.09865), Eq. 8, without their resampling.
    """
    noise_BSC = noise_BSC.float()
    latents_BSC = noise_BSC
    for sigma, following in pairwise(sigmas):
        if known is not None:
            latents_BSC = known.kept(latents_BSC, noise_BSC, sigma)
        predicted_BSC = _predicted(velocity, latents_BSC, sigma, guidance_scale, GUIDES[guidance])
        latents_BSC = latents_BSC + (following - sigma).to(latents_BSC) * predicted_BSC
    return latents_BSC if known is None else known.kept(latents_BSC, noise_BSC, sigmas[-1])


def _predicted(
    velocity: Velocity,
    latents_BSC: Tensor,
    sigma: Tensor,
    guidance_scale: float,
    guide: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    predictions = velocity(latents_BSC, sigma.expand(len(latents_BSC)).to(latents_BSC.device))
    expected = 2 if guidance_scale > 1 else 1
    assert len(predictions) == expected, (
        f"guidance {guidance_scale} needs {expected} predictions, got {len(predictions)}"
    )
    if guidance_scale > 1:
        conditional_BSC, unconditional_BSC = predictions
        return guide(conditional_BSC.float(), unconditional_BSC.float(), guidance_scale)
    return predictions[0].float()


def guided(conditional_BSC: Tensor, unconditional_BSC: Tensor, guidance_scale: float) -> Tensor:
    """The guided prediction, rescaled per token to the norm of the conditional one."""
    combined_BSC = unconditional_BSC + guidance_scale * (conditional_BSC - unconditional_BSC)
    norm_BS1 = conditional_BSC.norm(dim=-1, keepdim=True)
    # The floor changes nothing but 0 / 0: a model that predicts exactly nothing for a token.
    return combined_BSC * (norm_BS1 / combined_BSC.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def plainly_guided(conditional_BSC: Tensor, unconditional_BSC: Tensor, guidance_scale: float) -> Tensor:
    """The guided prediction as it is."""
    return unconditional_BSC + guidance_scale * (conditional_BSC - unconditional_BSC)


GUIDES: Final[dict[Guidance, Callable[[Tensor, Tensor, float], Tensor]]] = {
    "rescaled": guided,
    "plain": plainly_guided,
}
