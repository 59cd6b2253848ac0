"""The frozen encoders of Kandinsky 5 I2I: Qwen2.5-VL for a prompt with its picture, CLIP for the prompt as a whole.

Its VAE is that of FLUX.1, whose latents the pipeline scales and does not shift.

Shape suffixes: B samples, L text tokens, D text width.
"""

import inspect

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextModel, PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from ccmdist.models.flux_encoders import FluxCodec, load_text_encoder, padded
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import ImageTextProcessor, load_processor
from ccmdist.models.template import KANDINSKY_AFTER, KANDINSKY_BEFORE, KANDINSKY_NUM_DROPPED_TOKENS


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
        self.encoder, self.processor, self.clip, self.clip_tokenizer = encoder, processor, clip, clip_tokenizer
        self._inputs = set(inspect.signature(encoder.forward).parameters)
        self._known: dict[str, Tensor] = {}

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "KandinskyPrompts":
        """The text encoders of a model folder; nothing is fetched.

        Raises:
            ModelError: If weights do not fit their config.
        """
        logging.disable_progress_bar()
        kinds = ((Qwen2_5_VLForConditionalGeneration, "text_encoder"), (CLIPTextModel, "text_encoder_2"))
        encoder, clip = (load_text_encoder(kind, folder, name, dtype).to(device).eval() for kind, name in kinds)
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path / "tokenizer_2"), local_files_only=True)
        return cls(encoder, load_processor(folder.path, "tokenizer"), clip, tokenizer)

    @torch.no_grad()
    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt with its picture, shape (L, D) each, L without padding.

        Args:
            prompts: One per sample.
            pictures: What stands for the nerves of each: uint8, (H, W) or (H, W, 3); seen at half their edge.
        """
        # As the pipeline does; of the negative prompt nothing is left.
        cleaned = (" ".join(prompt.split()) for prompt in prompts)
        texts = [f"{KANDINSKY_BEFORE}{prompt}{KANDINSKY_AFTER}" for prompt in cleaned]
        images = [_halved(picture) for picture in pictures]
        inputs = self.processor(text=texts, images=images, padding=True, return_tensors="pt")
        inputs = {name: value.to(self.encoder.device) for name, value in inputs.items() if name in self._inputs}
        states_BLD = self.encoder(**inputs, output_hidden_states=True).hidden_states[-1]
        attended_BL = inputs["attention_mask"].bool()
        dropped = KANDINSKY_NUM_DROPPED_TOKENS
        return [s_LD[kept_L][dropped:] for s_LD, kept_L in zip(states_BLD, attended_BL, strict=True)]

    @torch.no_grad()
    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """CLIP's pooled output of each prompt, shape (P,).

        Raises:
            ConfigError: If a prompt is longer than CLIP takes.
        """
        return [self._pooled(text) for text in prompts]

    def _pooled(self, text: str) -> Tensor:
        if (known := self._known.get(text)) is not None:
            return known
        limit = int(self.clip_tokenizer.model_max_length)
        given = padded(self.clip_tokenizer, text, limit, "CLIP")
        return self._known.setdefault(text, self.clip(**given.to(self.clip.device)).pooler_output[0])


class KandinskyCodec(FluxCodec):
    """The same VAE; latents are not shifted."""

    @property
    def shift(self) -> float:
        """None."""
        return 0.0


def _halved(picture: np.ndarray) -> Image.Image:
    image = Image.fromarray(picture).convert("RGB")
    return image.resize((image.width // 2, image.height // 2))
