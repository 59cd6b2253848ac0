"""Denoising diffusion in 1000 noise levels, as in diffusers' schedulers, and its samplers: DDIM, DDPM, and all between.

Stock schedulers take fresh noise from one generator for a whole batch, so that an image would depend on those beside
it; here it is asked for, and whoever draws makes it from a request alone.

Shape suffixes: B samples, C channels, h w latent rows and columns.

Source: Ho et al. 2020 (arXiv:2006.11239), DDPM; Song et al. 2021 (arXiv:2010.02502), DDIM, Eq. 12 and 16; Salimans and
Ho 2022 (arXiv:2202.00512), velocity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor

from ccmdist.config.objectives.msdm import NUM_NOISE_LEVELS, MsdmSettings
from ccmdist.errors import ConfigError

NUM_LEVELS: Final = NUM_NOISE_LEVELS


class Predict(Protocol):
    """The model's predictions for noisy latents at a level."""

    def __call__(self, latents_BChw: Tensor, level: int) -> tuple[Tensor, ...]:
        """Predict with the prompt and, where there is to be guidance, with the negative prompt."""
        ...


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of an image is left at each level, and what a model predicts of it.

    Attributes:
        alpha_bars: Share of the image's variance at each level, fp32 of shape (1000,), descending.
        prediction: Of the noise, or of the velocity.
    """

    alpha_bars: Tensor
    prediction: Literal["epsilon", "v_prediction"]

    @classmethod
    def of(cls, settings: MsdmSettings) -> "NoiseSchedule":
        """The one that settings ask for, as of Stable Diffusion: square roots of beta evenly spaced."""
        start, end = settings.beta_start**0.5, settings.beta_end**0.5
        betas = torch.linspace(start, end, NUM_LEVELS, dtype=torch.float32) ** 2
        return cls(torch.cumprod(1 - betas, dim=0), settings.prediction)

    def noisy(self, x_BChw: Tensor, noise_BChw: Tensor, level_B: Tensor) -> Tensor:
        """sqrt(alpha_bar) x + sqrt(1 - alpha_bar) noise."""
        of_x, of_noise = self._weights(x_BChw, level_B)
        return of_x * x_BChw + of_noise * noise_BChw

    def target(self, x_BChw: Tensor, noise_BChw: Tensor, level_B: Tensor) -> Tensor:
        """What the model learns to predict: noise, or the velocity sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x."""
        if self.prediction == "epsilon":
            return noise_BChw
        of_x, of_noise = self._weights(x_BChw, level_B)
        return of_x * noise_BChw - of_noise * x_BChw

    def split(self, predicted_BChw: Tensor, latents_BChw: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """What a prediction says that noisy latents are made of: an image and noise."""
        alpha_bar = self.alpha_bars[level]
        of_x, of_noise = float(alpha_bar.sqrt()), float((1 - alpha_bar).sqrt())
        if self.prediction == "epsilon":
            return (latents_BChw - of_noise * predicted_BChw) / of_x, predicted_BChw
        return of_x * latents_BChw - of_noise * predicted_BChw, of_x * predicted_BChw + of_noise * latents_BChw

    def sigmas(self, levels: Tensor) -> Tensor:
        """Share of noise, sqrt(1 - alpha_bar), at each of some levels."""
        return (1 - self.alpha_bars[levels]).sqrt()

    def _weights(self, like_BChw: Tensor, level_B: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar_B111 = self.alpha_bars[level_B.cpu()].view(-1, 1, 1, 1).to(like_BChw)
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()


def sampling_levels(num_denoise_steps: int) -> tuple[int, ...]:
    """The levels of a sampler, from much noise to little: evenly spaced, diffusers' spacing "leading" with offset 1.

    With all 1000 there is no room for the offset.

    Raises:
        ConfigError: If there are more steps than levels.
    """
    if not 1 <= num_denoise_steps <= NUM_LEVELS:
        raise ConfigError(
            f"denoise_steps: {num_denoise_steps}, but the model knows {NUM_LEVELS} noise levels",
            f"use 1 to {NUM_LEVELS}",
        )
    spacing, offset = NUM_LEVELS // num_denoise_steps, int(num_denoise_steps < NUM_LEVELS)
    return tuple(step * spacing + offset for step in reversed(range(num_denoise_steps)))


@torch.no_grad()
def sample(
    predict: Predict,
    noise_BChw: Tensor,
    schedule: NoiseSchedule,
    num_denoise_steps: int,
    guidance_scale: float = 1.0,
    eta: float = 0.0,
    fresh_noise: Callable[[int], Tensor] | None = None,
) -> Tensor:
    """Latents of images, drawn from noise.

    Args:
        predict: The model.
        noise_BChw: Standard normal noise.
        schedule: The one that the model was trained with.
        num_denoise_steps: 1000 with ``eta`` 1 is DDPM.
        guidance_scale: w of u + w (c - u); 1 for none: ``predict`` then has one prediction, else two.
        eta: How much noise is added anew at each step: 0 none (DDIM), 1 as much as in DDPM.
        fresh_noise: Standard normal noise of each denoise step, like ``noise_BChw``; asked for if ``eta`` is not 0.
    """
    latents_BChw, spacing = noise_BChw.float(), NUM_LEVELS // num_denoise_steps
    for step, level in enumerate(sampling_levels(num_denoise_steps)):
        predicted_BChw = _predicted(predict, latents_BChw, level, guidance_scale)
        x_BChw, noise_left_BChw = schedule.split(predicted_BChw, latents_BChw, level)
        alpha_bar, following = schedule.alpha_bars[level], schedule.alpha_bars[max(level - spacing, 0)]
        added = eta**2 * (1 - following) / (1 - alpha_bar) * (1 - alpha_bar / following)
        kept = float((1 - following - added).clamp_min(0).sqrt())
        latents_BChw = float(following.sqrt()) * x_BChw + kept * noise_left_BChw
        if eta:
            assert fresh_noise is not None, "eta asks for noise at each step"
            latents_BChw = latents_BChw + float(added.sqrt()) * fresh_noise(step).to(latents_BChw)
    return latents_BChw


def _predicted(predict: Predict, latents_BChw: Tensor, level: int, guidance_scale: float) -> Tensor:
    predictions = predict(latents_BChw, level)
    expected = 2 if guidance_scale > 1 else 1
    assert len(predictions) == expected, (
        f"guidance {guidance_scale} needs {expected} predictions, got {len(predictions)}"
    )
    if guidance_scale > 1:
        conditional_BChw, unconditional_BChw = (prediction.float() for prediction in predictions)
        return unconditional_BChw + guidance_scale * (conditional_BChw - unconditional_BChw)
    return predictions[0].float()
