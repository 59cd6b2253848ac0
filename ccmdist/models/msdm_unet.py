"""MSDM's diffusion model: a U-Net with cross-attention to the states of a clinical text encoder, and its folder.

As in the paper's released code: states of the text are projected to tokens to which levels attend, and pooled by
attention into one vector that is added to the noise level's. Both are options of diffusers' UNet2DConditionModel, whose
projection is one linear; theirs are two. The mask's latents are more input channels, which is ours.

The folder is one that stock diffusers opens and draws with, StableDiffusionPipeline, or with masks
StableDiffusionInstructPix2PixPipeline:

FOLDER/
  network.json               settings, facts, digest
  model_index.json           which classes
  unet/ scheduler/           what was trained, and with which noise
  vae/ text_encoder/ tokenizer/   copies of what it was trained beside

Source: Chaichuk et al. 2025 (arXiv:2505.05573), MSDM; Brooks et al. 2023 (arXiv:2211.09800), InstructPix2Pix: latents
of a condition as more input channels.

Shape suffixes: B samples, L text tokens, D text width, C channels, h w latent rows and columns.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ccmdist.commit import commit_json, committed_file, digest_of
from ccmdist.config.objectives.msdm import MsdmSettings
from ccmdist.errors import ConfigError

PARTS: Final = ("vae", "text_encoder", "tokenizer")
"""Of the model folder, frozen."""
UNET: Final = "unet"
WEIGHTS: Final = f"{UNET}/diffusion_pytorch_model.safetensors"
MODEL_INDEX: Final = "model_index.json"


@dataclass(frozen=True)
class Ends:
    """Widths of what a U-Net is between.

    Attributes:
        latent_channels: Of the VAE.
        text_width: Of the text encoder's states.
    """

    latent_channels: int
    text_width: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Ends":
        """Those of trained weights, read off their shapes.

        Raises:
            KeyError: If they are not weights of such a U-Net.
        """
        return cls(len(tensors["conv_out.bias"]), tensors["encoder_hid_proj.weight"].shape[1])


def make_unet(settings: MsdmSettings, ends: Ends, seed: int) -> UNet2DConditionModel:
    """The U-Net with weights that depend on the seed alone.

    Raises:
        ConfigError: If the text encoder's states do not divide into as many heads.
    """
    if ends.text_width % settings.heads:
        raise ConfigError(
            f"objective.heads: the text encoder's states have {ends.text_width} channels, which do not divide into "
            f"{settings.heads} heads",
            "choose another number",
        )
    num_levels = len(settings.channels)
    attends = [num_levels - level <= settings.num_attention_levels for level in range(num_levels)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            in_channels=ends.latent_channels * (2 if settings.mask_condition else 1),
            out_channels=ends.latent_channels,
            block_out_channels=settings.channels,
            layers_per_block=settings.layers_per_block,
            down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
            up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
            norm_num_groups=settings.norm_groups,
            dropout=settings.dropout,
            cross_attention_dim=settings.cross_attention_dim,
            attention_head_dim=settings.heads,  # diffusers' name for their number
            encoder_hid_dim=ends.text_width,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text",
            addition_embed_type_num_heads=settings.heads,
        )


def predicted(
    network: torch.nn.Module, latents_BChw: Tensor, mask_BChw: Tensor | None, text_BLD: Tensor, level_B: Tensor
) -> Tensor:
    """What the network predicts of noisy latents, (B, C, h, w).

    Args:
        network: From :func:`make_unet`.
        latents_BChw: Noisy.
        mask_BChw: Latents of the masks, as the VAE gives them; None for a network without masks.
        text_BLD: States of the text encoder, padding and all.
        level_B: Noise levels, 0 to 999.
    """
    inputs = latents_BChw if mask_BChw is None else torch.cat([latents_BChw, mask_BChw], dim=1)
    found: Tensor = network(inputs, level_B, text_BLD, return_dict=False)[0]
    return found


def scheduler_config(settings: MsdmSettings) -> dict[str, Any]:
    """What gives diffusers' schedulers the noise that the network was trained with, and our sampler's levels."""
    return {
        "num_train_timesteps": 1000,
        "beta_start": settings.beta_start,
        "beta_end": settings.beta_end,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": settings.prediction,
    }


def encoders_digest(encoders: Mapping[str, Any]) -> str:
    """Identity of the VAE and the text encoder, which are all that the network knows of images and prompts.

    Args:
        encoders: Identity of the encoders, as the model folder gives it.
    """
    return digest_of({name: value for name, value in encoders.items() if name.startswith(("vae", "text", "tokenizer"))})


def write_pipeline(folder: Path, settings: MsdmSettings, image_size_px: int, unet: Any, parts: Path) -> None:
    """Write all of the folder but its description; each file appears complete or not at all.

    Args:
        folder: May hold the same pipeline already.
        settings: Of the network.
        image_size_px: Edge of the images that it draws.
        unet: The network.
        parts: The model folder that it was trained beside; may be ``folder``.
    """
    vae = json.loads((parts / "vae" / "config.json").read_text())
    unet.register_to_config(sample_size=image_size_px // 2 ** (len(vae["block_out_channels"]) - 1))
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        unet.save_pretrained(temporary)
        _copy(Path(temporary), folder / UNET)
    scheduler = DDIMScheduler(**scheduler_config(settings))
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        scheduler.save_pretrained(temporary)
        _copy(Path(temporary), folder / "scheduler")
    index = json.loads((parts / MODEL_INDEX).read_text())
    if parts.resolve() != folder.resolve():
        for part in PARTS:
            _copy(parts / part, folder / part)
    # Last, for it makes the folder a model.
    commit_json(folder / MODEL_INDEX, index | _classes(settings))


def _classes(settings: MsdmSettings) -> dict[str, Any]:
    with_mask, without = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionPipeline"
    return {
        "_class_name": with_mask if settings.mask_condition else without,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def _copy(source: Path, folder: Path) -> None:
    for file in sorted(source.iterdir()):
        with committed_file(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)


def dropped(text_BLD: Tensor, null_LD: Tensor, is_dropped: Sequence[bool]) -> Tensor:
    """States of prompts, of those that are dropped the negative prompt's."""
    at_B = torch.tensor(is_dropped, device=text_BLD.device).view(-1, 1, 1)
    return torch.where(at_B, null_LD.to(text_BLD), text_BLD)
