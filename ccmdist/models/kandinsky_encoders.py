"""The frozen encoders of Kandinsky 5 I2I: Qwen2.5-VL for a prompt with its picture, CLIP for the prompt as a whole.

Its VAE is that of FLUX.1, whose latents the pipeline scales and does not shift.

Shape suffixes: B samples, L text tokens, D text width.
"""

from typing import Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from ccmdist.errors import ConfigError
from ccmdist.models.encoders import last_states, load_text_encoder
from ccmdist.models.flux_encoders import FluxCodec, WordEncoder
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import ImageTextProcessor, load_processor
from ccmdist.models.template import KANDINSKY_AFTER, KANDINSKY_BEFORE, KANDINSKY_NUM_DROPPED_TOKENS

MAX_TEXT_TOKENS: Final = 1024
"""Those of the picture among them: positions that the transformer has angles for, and what the pipeline cuts at."""


class KandinskyPrompts:
    """Both text encoders, as diffusers' Kandinsky5I2IPipeline calls them; embeddings are not padded."""

    sees_pictures = True

    def __init__(
        self,
        encoder: Qwen2_5_VLForConditionalGeneration,
        processor: ImageTextProcessor,
        clip: CLIPTextModel,
        clip_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Take encoders and what belongs to them."""
        self.encoder, self.processor = encoder, processor
        self._whole = WordEncoder(
            "CLIP",
            clip_tokenizer,
            int(clip_tokenizer.model_max_length),
            lambda of: clip(**of.to(clip.device)).pooler_output[0],
        )

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "KandinskyPrompts":
        """The text encoders of a model folder; nothing is fetched.

        Raises:
            ModelError: If weights do not fit their config.
        """
        kinds = ((Qwen2_5_VLForConditionalGeneration, "text_encoder"), (CLIPTextModel, "text_encoder_2"))
        encoder, clip = (load_text_encoder(kind, folder, name, dtype, device) for kind, name in kinds)
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path / "tokenizer_2"), local_files_only=True)
        return cls(encoder, load_processor(folder.path, "tokenizer"), clip, tokenizer)

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt with its picture, shape (L, D) each, L without padding.

        Args:
            prompts: One per sample.
            pictures: What stands for the nerves of each: uint8, (H, W) or (H, W, 3); seen at half their edge.

        Raises:
            ConfigError: If one has more tokens than the transformer has positions.
        """
        # As the pipeline does; of the negative prompt nothing is left.
        cleaned = [" ".join(prompt.split()) for prompt in prompts]
        texts = [f"{KANDINSKY_BEFORE}{prompt}{KANDINSKY_AFTER}" for prompt in cleaned]
        images = [_halved(picture) for picture in pictures]
        found = last_states(self.encoder, self.processor, texts, images, KANDINSKY_NUM_DROPPED_TOKENS)
        for prompt, states_LD in zip(prompts, found, strict=True):
            if len(states_LD) > MAX_TEXT_TOKENS:
                raise ConfigError(
                    f"the prompt that ends in {prompt[-60:]!r} has, with its picture, {len(states_LD)} tokens, the "
                    f"transformer takes {MAX_TEXT_TOKENS}",
                    "give its sample a shorter prompt in the shards, or set a smaller data.image_size_px",
                )
        return found

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """CLIP's pooled output of each prompt, shape (P,).

        Raises:
            ConfigError: If a prompt is longer than CLIP takes.
        """
        return [self._whole(text) for text in prompts]


class KandinskyCodec(FluxCodec):
    """The same VAE; latents are not shifted."""

    @property
    def shift(self) -> float:
        """None."""
        return 0.0


def _halved(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture).convert("RGB")
    return image.resize((image.width // 2, image.height // 2))
