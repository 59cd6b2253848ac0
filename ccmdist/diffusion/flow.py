"""Rectified flow in diffusers' convention: sigma 1 is noise, target = noise - x; and the noise levels that are used.

Shape suffixes: B samples, S packed latent tokens, C channels (of latents, 4 times as many when packed),
h w latent rows and columns.

Source: Esser et al. 2024 (arXiv:2403.03206), rectified flow with a resolution-dependent shift of the noise levels.
"""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ccmdist.errors import ConfigError, ModelError

NUM_TRAINING_SIGMAS = 1000
SUPPORTED: Final = {
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""Options of diffusers' scheduler that change its noise levels, with the only values that are followed here."""


def interpolate(x_BSC: Tensor, noise_BSC: Tensor, sigma_B: Tensor) -> Tensor:
    """Noisy latents (1 - sigma) x + sigma noise.

    Args:
        x_BSC: Clean packed latents of unit variance.
        noise_BSC: Standard normal noise of the same shape.
        sigma_B: Noise level of each sample, in [0, 1]; 1 is pure noise.
    """
    sigma_B11 = sigma_B.view(-1, 1, 1).to(x_BSC)
    return (1 - sigma_B11) * x_BSC + sigma_B11 * noise_BSC


def velocity_target(x_BSC: Tensor, noise_BSC: Tensor) -> Tensor:
    """What the model learns to predict: noise - x, the derivative of :func:`interpolate` by sigma."""
    return noise_BSC - x_BSC


def pack_latents(latents_BChw: Tensor) -> Tensor:
    """(B, C, h, w) to (B, (h/2)(w/2), 4C): each token is a patch of 2 x 2 latents."""
    B, C, h, w = latents_BChw.shape
    patches = latents_BChw.reshape(B, C, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(B, (h // 2) * (w // 2), 4 * C)


def unpack_latents(tokens_BSC: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack_latents` for latents of ``height`` rows and ``width`` columns."""
    B, _, C = tokens_BSC.shape
    patches = tokens_BSC.reshape(B, height // 2, width // 2, C // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(B, C // 4, height, width)


def resolution_shift(num_tokens: int, noise_schedule: Mapping[str, Any]) -> float:
    """The shift mu for an image of ``num_tokens`` target tokens, linear between the schedule's two anchors.

    Args:
        num_tokens: Packed tokens of the target image, (H/16)(W/16).
        noise_schedule: The checkpoint's scheduler config. Without dynamic shifting mu is log(shift).

    Raises:
        ModelError: If the config asks for noise levels of another kind.
    """
    for name, expected in SUPPORTED.items():
        if (got := noise_schedule.get(name) or expected) != expected:
            raise ModelError(
                f"scheduler_config.json: {name} {got!r} is not supported, expected {expected!r}",
                "use the scheduler config that the model is published with",
            )
    if not noise_schedule.get("use_dynamic_shifting", False):
        return math.log(noise_schedule.get("shift", 1.0))
    few, many = noise_schedule.get("base_image_seq_len", 256), noise_schedule.get("max_image_seq_len", 4096)
    low, high = noise_schedule.get("base_shift", 0.5), noise_schedule.get("max_shift", 1.15)
    slope = (high - low) / (many - few)
    return num_tokens * slope + (low - slope * few)


def shifted(sigmas: Tensor, mu: float) -> Tensor:
    """Noise levels moved towards 1 by the shift mu: e^mu / (e^mu + 1/sigma - 1)."""
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def training_sigmas(mu: float) -> Tensor:
    """The grid of noise levels of training, shape (1000,), from 1 downwards.

    Every training step uses a level of this grid, so what depends on the noise level alone can be tabulated.
    """
    return shifted(torch.linspace(1, 1 / NUM_TRAINING_SIGMAS, NUM_TRAINING_SIGMAS, dtype=torch.float64), mu).float()


def draw_sigma(kind: str, grid: Tensor, source: torch.Generator) -> Tensor:
    """A noise level of the grid, shape ().

    Args:
        kind: "uniform" over the grid, or "logit_normal": the sigmoid of a standard normal picks the place in it.
        grid: From :func:`training_sigmas`.
        source: Of randomness.
    """
    if kind == "uniform":
        place = torch.rand((), generator=source)
    elif kind == "logit_normal":
        place = torch.sigmoid(torch.randn((), generator=source))
    else:
        raise ConfigError(f"sigma_sampling: {kind!r} is not known", "use 'logit_normal' or 'uniform'")
    return grid[min(int(place * len(grid)), len(grid) - 1)]


def sigma_shares(kind: str, grid: Tensor) -> Tensor:
    """How often :func:`draw_sigma` draws each level of the grid, shape (N,), fp64; sums to 1."""
    edges = torch.linspace(0, 1, len(grid) + 1, dtype=torch.float64)
    # P(sigmoid(z) < place) = P(z < logit(place)) of a standard normal z.
    below = torch.special.ndtr(torch.logit(edges)) if kind == "logit_normal" else edges
    return below.diff()


def min_snr_weights(sigma_B: Tensor, gamma: float) -> Tensor:
    """Weights of squared errors of the velocity that are Min-SNR's weights of squared errors of x; not normalised.

    Min-SNR bounds the weight of a noise level when x is predicted: min(SNR, gamma). Here the velocity is, and the image
    that it implies is x = x_sigma - sigma v; so an error of the velocity is one of x that is sigma times as large:
    ||x' - x||^2 = sigma^2 ||v' - v||^2. With SNR = ((1 - sigma) / sigma)^2 the weight becomes

        sigma^2 min(SNR, gamma) = min((1 - sigma)^2, gamma sigma^2),

    largest at sigma = 1 / (1 + sqrt(gamma)), and 0 where there is only noise, for the SNR is.

    Source: Hang et al. 2023 (arXiv:2303.09556), Min-SNR-gamma: the weights of x; for the flow derived here.
    """
    return torch.minimum((1 - sigma_B).square(), gamma * sigma_B.square())


def nearest_on_grid(sigma: float, grid: Tensor) -> Tensor:
    """The level of the grid that is closest to ``sigma``, shape ()."""
    return grid[(grid - sigma).abs().argmin()]


def sampling_sigmas(num_denoise_steps: int, mu: float, noise_schedule: Mapping[str, Any]) -> Tensor:
    """Noise levels of a sampler, shape (num_denoise_steps + 1,), from 1 down to 0.

    Equal to what diffusers' FlowMatchEulerDiscreteScheduler makes of linspace(1, 1/n, n) and mu; or, where
    ``_levels`` is "scheduler", to what it makes of n alone, as pipelines ask it to that give it no levels: it shifts
    the levels between its largest and its smallest, which are shifted already, once more.

    Raises:
        ConfigError: If there is only one step: the stretch to the terminal level divides by zero there.
    """
    if num_denoise_steps < 2:
        raise ConfigError(f"denoise_steps: {num_denoise_steps} is too few", "use at least 2")
    smallest = torch.tensor(1 / num_denoise_steps, dtype=torch.float64)
    if noise_schedule.get("_levels") == "scheduler":
        smallest = shifted(torch.tensor(1 / NUM_TRAINING_SIGMAS, dtype=torch.float64), mu)
    levels = torch.linspace(1, float(smallest), num_denoise_steps, dtype=torch.float64)
    levels = shifted(levels, mu)
    if terminal := noise_schedule.get("shift_terminal"):
        levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    return torch.cat([levels, torch.zeros(1, dtype=torch.float64)]).float()
