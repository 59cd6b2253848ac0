"""Mask and prompt to embeddings, frames to latents and back: the two frozen encoders of Qwen-Image-Edit.

* Prompts are encoded by our own call, which hands over every output of the processor. The stock pipelines drop
  ``mm_token_type_ids`` under transformers 5, and the encoder then falls back to 1-D positions without a word.
* Embeddings are not padded, so no padding mask exists anywhere downstream.
* Grey is a contract: one channel goes in three times, and the mean of three comes out.

Shape suffixes: B samples, L text tokens, D text width, C latent channels, H W pixels, h w = H/8 W/8.
"""

import inspect
import math

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from diffusers.models.modeling_utils import no_init_weights
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from ccmdist.errors import ModelError
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import ImageTextProcessor, load_processor
from ccmdist.models.template import CONDITION_EDGE_PX, EDIT_SYSTEM, NUM_DROPPED_TOKENS, encoder_text
from ccmdist.models.vae import denormalised, for_single_frames, normalised


class PromptEncoder:
    """Qwen2.5-VL as Qwen-Image-Edit uses it: the last hidden states of a prompt with its mask."""

    def __init__(
        self, encoder: Qwen2_5_VLForConditionalGeneration, processor: ImageTextProcessor, folder: ModelFolder
    ) -> None:
        """Take an encoder and the processor that belongs to it.

        Raises:
            ModelError: If the tokenizer does not fit the template of Qwen-Image-Edit.
        """
        self.encoder, self.processor, self.version = encoder, processor, folder.version
        self._inputs = set(inspect.signature(encoder.forward).parameters)
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
        logging.disable_progress_bar()
        path = folder.path / "text_encoder"
        encoder, loading = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            str(path), dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
        for problem in ("missing_keys", "mismatched_keys"):
            if loading[problem]:
                raise ModelError(
                    f"{path}: {problem.replace('_keys', '')} weights, such as {min(map(str, loading[problem]))}",
                    "use config.json and weights of the same checkpoint",
                )
        return cls(encoder.to(device).eval(), load_processor(folder.path), folder)

    @torch.no_grad()
    def encode(self, prompts: list[str], nerve_masks: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt with its mask, shape (L, D) each, L without padding.

        Args:
            prompts: One per sample.
            nerve_masks: Boolean masks of shape (H, W), of any size.
        """
        texts = [encoder_text(prompt, self.version) for prompt in prompts]
        images = [self.condition_image(nerve_mask) for nerve_mask in nerve_masks]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = {name: value.to(self.encoder.device) for name, value in inputs.items() if name in self._inputs}
        states_BLD = self.encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        attended_BL = inputs["attention_mask"].bool()
        return [s_LD[kept_L][NUM_DROPPED_TOKENS:] for s_LD, kept_L in zip(states_BLD, attended_BL, strict=True)]

    def condition_image(self, nerve_mask: np.ndarray) -> Image.Image:
        """The mask as the pipelines show it to the encoder: RGB, of a fixed area, edges multiples of 32 px.

        Source: calculate_dimensions in diffusers' Qwen-Image-Edit pipelines.
        """
        height, width = nerve_mask.shape
        wide_px = CONDITION_EDGE_PX[self.version] * math.sqrt(width / height)
        size = (round(wide_px / 32) * 32, round(wide_px * height / width / 32) * 32)
        image = Image.fromarray(nerve_mask.astype(np.uint8) * 255).convert("RGB")
        return image.resize(size, Image.Resampling.LANCZOS)


class LatentCodec:
    """The VAE of Qwen-Image on grey frames."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        """Take a VAE, which is changed in place to work on single frames."""
        self.vae = for_single_frames(vae)

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "LatentCodec":
        """The VAE of a model folder; nothing is fetched.

        Raises:
            ModelError: If the weights do not fit the config.
        """
        with no_init_weights():
            vae = AutoencoderKLQwenImage.from_config(folder.config("vae"))
        torch.nn.Module.to(vae, device, dtype)
        load_weights(vae, folder.weight_files("vae"))
        return cls(vae.eval())

    @torch.no_grad()
    def encode(self, images_BHW: np.ndarray) -> Tensor:
        """Normalised latents, the mode of the posterior, shape (B, C, h, w), in the VAE's dtype.

        Args:
            images_BHW: Grey frames, uint8; height and width are multiples of 8.
        """
        grey_BHW = torch.from_numpy(np.ascontiguousarray(images_BHW)).to(self.vae.device)
        rgb = rgb_of_grey(grey_BHW).to(self.vae.dtype).unsqueeze(2)
        return normalised(self.vae.encode(rgb).latent_dist.mode(), self.vae).squeeze(2)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames, uint8 of shape (B, H, W), of normalised latents."""
        latents = denormalised(latents_BChw.to(self.vae.device, self.vae.dtype), self.vae).unsqueeze(2)
        return grey_of_rgb(self.vae.decode(latents).sample.squeeze(2)).cpu().numpy()


def rgb_of_grey(grey_BHW: Tensor) -> Tensor:
    """uint8 (B, H, W) to three equal float channels in [-1, 1], (B, 3, H, W)."""
    return (grey_BHW.float() / 127.5 - 1).unsqueeze(1).expand(-1, 3, -1, -1)


def grey_of_rgb(rgb_B3HW: Tensor) -> Tensor:
    """Float channels in [-1, 1] to their mean as uint8 (B, H, W); the inverse of :func:`rgb_of_grey`."""
    return ((rgb_B3HW.float().mean(dim=1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
