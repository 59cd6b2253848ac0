"""MAISI-style latent diffusion in 2-D: MONAI's U-Net of MAISI on the latents of an image, given those of its mask.

From MAISI: the U-Net with its class embedding and its input for the size of a pixel, and, of MAISI-v2, rectified flow.
Ours, because MAISI is a model of 3-D CT and the paper's adaptation was not found:

* The mask is given as latents beside the noisy ones. MAISI trains a ControlNet on a frozen U-Net that has already seen
  volumes without masks; here every image has a mask, and one network trained at once needs no second copy.
* The class is the clinical group, the last one standing for none: unlabelled images, and guidance.
* The size of a pixel is given as (rows, columns, 0): there is no third axis.
* Latents are those of Qwen-Image's VAE, frozen, not of a VAE trained on CT.

Source: Guo et al. 2024, MAISI (arXiv:2409.11169); Zhao et al. 2025, MAISI-v2 (arXiv:2508.05772).

Shape suffixes: B samples, C channels, h w latent rows and columns.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.commit import digest_of
from ccmdist.config.objectives.baselines import MaisiSettings

LATENT_CHANNELS: Final = 16
NULL_CLASS: Final = len(CLINICAL_GROUPS)
TIMESTEPS: Final = 1000.0
"""Noise level 1 in the units of the U-Net's sinusoids."""


def make_maisi(settings: MaisiSettings, seed: int) -> nn.Module:
    """The U-Net with weights that depend on the seed alone."""
    from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

    num_levels = len(settings.channels)
    attends = [num_levels - level <= settings.num_attention_levels for level in range(num_levels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffusionModelUNetMaisi(
            spatial_dims=2,
            in_channels=2 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_channels=settings.channels,
            num_res_blocks=settings.num_res_blocks,
            attention_levels=attends,
            num_head_channels=settings.head_channels,
            norm_num_groups=settings.norm_groups,
            num_class_embeds=len(CLINICAL_GROUPS) + 1,
            include_spacing_input=True,
            include_fc=True,
        )


def velocity(
    network: nn.Module,
    latents_BChw: Tensor,
    mask_BChw: Tensor,
    class_B: Tensor,
    um_per_px_B: Tensor,
    sigma_B: Tensor,
) -> Tensor:
    """The predicted noise - x of noisy latents, (B, C, h, w).

    Args:
        network: From :func:`make_maisi`.
        latents_BChw: Noisy.
        mask_BChw: Latents of the masks.
        class_B: From :func:`classes`.
        um_per_px_B: Size of a pixel.
        sigma_B: Noise levels.
    """
    spacing_B3 = torch.stack([um_per_px_B, um_per_px_B, torch.zeros_like(um_per_px_B)], dim=1)
    predicted_BChw: Tensor = network(
        torch.cat([latents_BChw, mask_BChw], dim=1),
        sigma_B * TIMESTEPS,
        class_labels=class_B,
        spacing_tensor=spacing_B3,
    )
    return predicted_BChw


def latents_digest(encoders: Mapping[str, Any]) -> str:
    """Identity of the VAE, whose latents are all that the network knows of images.

    Args:
        encoders: Identity of the encoders, as the model folder gives it.
    """
    return digest_of([encoders["vae_config"], encoders["vae_weights"]])


def classes(groups: Sequence[ClinicalGroup | None]) -> Tensor:
    """The class of each clinical group, int64 (B,); :data:`NULL_CLASS` for None."""
    return torch.tensor([NULL_CLASS if group is None else CLINICAL_GROUPS.index(group) for group in groups])
