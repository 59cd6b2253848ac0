"""MSDM's frozen half, a model folder: a VAE trained from scratch, a clinical text encoder, and how both are called.

FOLDER/
  network.json         settings of the VAE, facts, digest
  model_index.json     the stock pipeline that it will be; the U-Net, `unet`, comes with stage two
  vae/                 diffusers' AutoencoderKL; `scaling_factor` is 1 / standard deviation of training images' latents
  text_encoder/ tokenizer/   of transformers
  scheduler/           noise levels of the released code; stage two writes its own

Latents of images are scaled to a standard deviation of one; those of masks, a condition, are not: as diffusers'
StableDiffusionInstructPix2PixPipeline has it, with which a trained MSDM is drawn.

Shape suffixes: B samples, C latent channels, H W pixels, h w latent rows and columns.

Source: Chaichuk et al. 2025 (arXiv:2505.05573), MSDM, and its released code.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers import __version__ as diffusers_version
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from ccmdist.commit import commit_bytes, commit_json, committed_file
from ccmdist.config.objectives.msdm import MsdmSettings, MsdmVaeSettings
from ccmdist.errors import ConfigError
from ccmdist.models.encoders import grey_of_rgb, rgb_for
from ccmdist.models.model_folder import MSDM_WEIGHT_FILES, ModelFolder
from ccmdist.models.msdm_unet import scheduler_config
from ccmdist.models.text_encoders import TextEncoder, chosen_text_encoder
from ccmdist.models.vae import loaded_vae

VAE_WEIGHTS: Final = f"vae/{MSDM_WEIGHT_FILES['vae']}.safetensors"
SCALING_FACTOR: Final = "scaling_factor"
"""Of the VAE's config, and the fact by which the description of the network gives it."""


def make_vae(settings: MsdmVaeSettings, seed: int, scaling_factor: float = 1.0) -> AutoencoderKL:
    """The VAE with weights that depend on the seed alone; without attention, as in the released code."""
    num_levels = len(settings.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoencoderKL(
            in_channels=3,
            out_channels=3,
            latent_channels=settings.latent_channels,
            block_out_channels=settings.channels,
            down_block_types=("DownEncoderBlock2D",) * num_levels,
            up_block_types=("UpDecoderBlock2D",) * num_levels,
            layers_per_block=settings.layers_per_block,
            norm_num_groups=settings.norm_groups,
            mid_block_add_attention=False,
            scaling_factor=scaling_factor,
        )


class MsdmCodec:
    """The VAE of an MSDM on grey frames, and on pictures that stand for their nerves."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Take a VAE; its config says how latents of images are scaled."""
        self.vae = vae

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "MsdmCodec":
        """The VAE of a model folder; nothing is fetched.

        Raises:
            ModelError: If the weights do not fit the config.
        """
        return cls(loaded_vae(AutoencoderKL, folder, dtype, device))

    @property
    def factor(self) -> int:
        """Pixels of an edge per latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def encode(self, pictures: np.ndarray) -> Tensor:
        """Scaled latents of images, the mode of the posterior, shape (B, C, h, w), in the VAE's dtype.

        Args:
            pictures: uint8, grey (B, H, W) or with colours (B, H, W, 3).

        Raises:
            ConfigError: If the VAE does not divide their edges.
        """
        return self.encode_structure(pictures) * self.vae.config.scaling_factor

    @torch.no_grad()
    def encode_structure(self, pictures: np.ndarray) -> Tensor:
        """Latents of what stands for the nerves, as :meth:`encode` but not scaled."""
        if any(edge_px % self.factor for edge_px in pictures.shape[1:3]):
            lower = pictures.shape[1] // self.factor * self.factor
            raise ConfigError(
                f"data.image_size_px: the VAE divides edges by {self.factor}, {pictures.shape[1]} px do not divide",
                f"set it to {lower} or {lower + self.factor}, and train with the same",
            )
        mode: Tensor = self.vae.encode(rgb_for(self.vae, pictures)).latent_dist.mode()
        return mode

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames, uint8 of shape (B, H, W), of scaled latents."""
        return self._decoded(latents_BChw.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor)

    @torch.no_grad()
    def decode_structure(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey pictures, uint8 of shape (B, H, W), of latents of what stands for the nerves."""
        return self._decoded(latents_BChw.to(self.vae.device, self.vae.dtype))

    def _decoded(self, latents_BChw: Tensor) -> np.ndarray:
        return grey_of_rgb(self.vae.decode(latents_BChw).sample).cpu().numpy()


def load_text_encoder(folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> TextEncoder:
    """The text encoder of a model folder.

    Raises:
        ModelError: If weights do not fit the config.
    """
    return TextEncoder.load(folder.path / "text_encoder", folder.path / "tokenizer", dtype, device)


def measured_scaling(vae: AutoencoderKL, images: Iterable[np.ndarray]) -> float:
    """1 / standard deviation of the latents of grey images, uint8 (H, W), over all of them and all channels."""
    codec, total, squares, count = MsdmCodec(vae), 0.0, 0.0, 0
    for image in images:
        latents = codec.encode_structure(image[None]).double()
        total, squares, count = (
            total + float(latents.sum()),
            squares + float(latents.square().sum()),
            count + latents.numel(),
        )
    return float((squares / count - (total / count) ** 2) ** -0.5)


def write_encoders(
    folder: Path, settings: MsdmVaeSettings, facts: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Write all of the folder but its description; each file appears complete or not at all.

    Args:
        folder: May hold the same already.
        settings: Of the VAE, and which text encoder to lay beside it.
        facts: Of its description: how latents of images are scaled.
        tensors: Weights of the VAE.

    Raises:
        ModelError: If the text encoder cannot be read.
    """
    logging.disable_progress_bar()
    text = chosen_text_encoder(settings.text_encoder, settings.max_text_tokens)
    with torch.device("meta"):
        vae = make_vae(settings, 0, float(facts[SCALING_FACTOR]))
    scheduler = DDIMScheduler(**scheduler_config(MsdmSettings()))
    _commit_saved(folder / "vae", vae.save_config)
    with committed_file(folder / VAE_WEIGHTS) as temporary:
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary)
    _commit_saved(folder / "text_encoder", text.model.save_pretrained)
    _commit_saved(folder / "tokenizer", text.tokenizer.save_pretrained)
    _commit_saved(folder / "scheduler", scheduler.save_pretrained)
    # Last, for it makes the folder a model.
    commit_json(folder / "model_index.json", _model_index(text))


def _model_index(text: TextEncoder) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionInstructPix2PixPipeline",
        "_diffusers_version": diffusers_version,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", type(text.model).__name__],
        "tokenizer": ["transformers", type(text.tokenizer).__name__],
        "unet": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }


def _commit_saved(folder: Path, save: Callable[[str], Any]) -> None:
    """Commit the files that a library's ``save`` writes into a folder."""
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        save(temporary)
        for file in sorted(Path(temporary).iterdir()):
            commit_bytes(folder / file.name, file.read_bytes())
