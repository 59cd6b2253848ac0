"""Structure picture and prompt to embeddings, frames to latents and back: the frozen encoders of Qwen-Image-Edit.

* Prompts are encoded by our own call, which hands over every output of the processor. The stock pipelines drop
  ``mm_token_type_ids`` under transformers 5, and the encoder then falls back to 1-D positions without a word.
* Embeddings are not padded, so no padding mask exists anywhere downstream.
* Grey is a contract: one channel goes in three times, and the mean of three comes out. A picture with colours, such
  as a map of points, goes in as it is.

Shape suffixes: B samples, L text tokens, D text width, C latent channels, H W pixels, h w = H/8 W/8.
"""

import inspect
import math
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from ccmdist.errors import ModelError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import ImageTextProcessor, load_processor
from ccmdist.models.template import CONDITION_EDGE_PX, EDIT_SYSTEM, NUM_DROPPED_TOKENS, encoder_text
from ccmdist.models.vae import denormalised, for_single_frames, loaded_vae, normalised


class PromptEncoder:
    """Qwen2.5-VL as Qwen-Image-Edit uses it: the last hidden states of a prompt with its picture."""

    sees_pictures = True

    def __init__(
        self, encoder: Qwen2_5_VLForConditionalGeneration, processor: ImageTextProcessor, folder: ModelFolder
    ) -> None:
        """Take an encoder and the processor that belongs to it.

        Raises:
            ModelError: If the tokenizer does not fit the template of Qwen-Image-Edit.
        """
        self.encoder, self.processor, self.version = encoder, processor, folder.version
        if (count := len(processor.tokenizer(EDIT_SYSTEM)["input_ids"])) != NUM_DROPPED_TOKENS:
            raise ModelError(
                f"{folder.path}/tokenizer: the prefix of the template takes {count} tokens, "
                f"expected {NUM_DROPPED_TOKENS}",
                "use the tokenizer that belongs to this checkpoint",
            )

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "PromptEncoder":
        """The encoder of a model folder; nothing is fetched.

        Raises:
            ModelError: If weights do not fit the config. Those that are missing transformers would draw at random.
        """
        encoder = load_text_encoder(Qwen2_5_VLForConditionalGeneration, folder, "text_encoder", dtype, device)
        return cls(encoder, load_processor(folder.path), folder)

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt with its picture, shape (L, D) each, L without padding.

        Args:
            prompts: One per sample.
            pictures: What stands for the nerves of each: uint8, (H, W) or (H, W, 3), of any size.
        """
        texts = [encoder_text(prompt, self.version) for prompt in prompts]
        images = [self.condition_image(picture) for picture in pictures]
        return last_states(self.encoder, self.processor, texts, images, NUM_DROPPED_TOKENS)

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """Nothing: this model has no second text encoder."""
        return [None] * len(prompts)

    def condition_image(self, picture: np.ndarray) -> Image.Image:
        """The picture as the pipelines show it to the encoder: RGB, of a fixed area, edges multiples of 32 px.

        Source: calculate_dimensions in diffusers' Qwen-Image-Edit pipelines.
        """
        height, width = picture.shape[:2]
        wide_px = CONDITION_EDGE_PX[self.version] * math.sqrt(width / height)
        size = (round(wide_px / 32) * 32, round(wide_px * height / width / 32) * 32)
        return Image.fromarray(picture).convert("RGB").resize(size, Image.Resampling.LANCZOS)


class LatentCodec:
    """The VAE of Qwen-Image on frames, which are grey, and on pictures with colours that stand for their nerves."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        """Take a VAE, which is changed in place to work on single frames."""
        self.vae = for_single_frames(vae)

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "LatentCodec":
        """The VAE of a model folder; nothing is fetched.

        Raises:
            ModelError: If the weights do not fit the config.
        """
        return cls(loaded_vae(AutoencoderKLQwenImage, folder, dtype, device))

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        """Normalised latents, the mode of the posterior, shape (B, C, h, w), in the VAE's dtype.

        Args:
            pictures: uint8, grey (B, H, W) or with colours (B, H, W, 3); height and width are multiples of 8.
        """
        rgb = rgb_for(self.vae, pictures).unsqueeze(2)
        return normalised(self.vae.encode(rgb).latent_dist.mode(), self.vae).squeeze(2)

    def encode_structure(self, pictures: np.ndarray) -> Tensor:
        """Latents of what stands for the nerves; here as of images."""
        return self.encode(pictures)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames, uint8 of shape (B, H, W), of normalised latents."""
        latents = denormalised(latents_BChw.to(self.vae.device, self.vae.dtype), self.vae).unsqueeze(2)
        return grey_of_rgb(self.vae.decode(latents).sample.squeeze(2)).cpu().numpy()


def load_text_encoder(
    kind: Any, folder: ModelFolder, component: str, dtype: torch.dtype, device: torch.device | str
) -> Any:
    """An encoder of a class of transformers from a folder's component, frozen and on a device.

    Raises:
        ModelError: If weights do not fit their config. Those that are missing transformers would draw at random.
    """
    logging.disable_progress_bar()
    path = folder.path / component
    encoder, loading = kind.from_pretrained(
        str(path), dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
    )
    for problem in ("missing_keys", "mismatched_keys"):
        if loading[problem]:
            raise ModelError(
                f"{path}: {problem.replace('_keys', '')} weights, such as {min(map(str, loading[problem]))}",
                "use config.json and weights of the same checkpoint",
            )
    return encoder.to(device).eval().requires_grad_(False)


@torch.no_grad()
def last_states(
    encoder: Qwen2_5_VLForConditionalGeneration,
    processor: ImageTextProcessor,
    texts: list[str],
    images: list[Image.Image],
    num_dropped: int,
) -> list[Tensor]:
    """The last hidden states of whole texts with an image each, shape (L, D) each.

    Args:
        encoder: Handed every output of the processor that it takes.
        processor: That belongs to it.
        texts: With the place of the image.
        images: One for each text.
        num_dropped: Tokens at the beginning of each text whose states are left out.
    """
    takes = inspect.signature(encoder.forward).parameters
    inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
    inputs = {name: value.to(encoder.device) for name, value in inputs.items() if name in takes}
    states_BLD = encoder(**inputs, output_hidden_states=True).hidden_states[-1]
    attended_BL = inputs["attention_mask"].bool()
    return [s_LD[kept_L][num_dropped:] for s_LD, kept_L in zip(states_BLD, attended_BL, strict=True)]


def rgb_for(vae: Any, pictures: np.ndarray) -> Tensor:
    """Pictures, uint8, grey (B, H, W) or with colours (B, H, W, 3), as a VAE takes them: (B, 3, H, W) in [-1, 1]."""
    given = torch.from_numpy(np.ascontiguousarray(pictures)).to(vae.device)
    return (rgb_of_grey(given) if given.dim() == 3 else scaled_rgb(given)).to(vae.dtype)


def rgb_of_grey(grey_BHW: Tensor) -> Tensor:
    """uint8 (B, H, W) to three equal float channels in [-1, 1], (B, 3, H, W)."""
    return (grey_BHW.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def scaled_rgb(rgb_BHW3: Tensor) -> Tensor:
    """uint8 (B, H, W, 3) to float channels in [-1, 1], (B, 3, H, W)."""
    return (rgb_BHW3.float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def grey_of_rgb(rgb_B3HW: Tensor) -> Tensor:
    """Float channels in [-1, 1] to their mean as uint8 (B, H, W); the inverse of :func:`rgb_of_grey`."""
    return ((rgb_B3HW.float().mean(dim=1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
