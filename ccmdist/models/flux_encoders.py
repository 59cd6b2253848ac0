"""The frozen encoders of FLUX.1: T5 for the words of a prompt, CLIP for the prompt as a whole, and its VAE.

Neither text encoder sees a picture. T5's embeddings are padded to one length, and the transformer attends to the
padding: so it was trained, and so the stock pipelines call it.

Shape suffixes: B samples, L text tokens, D text width, C latent channels, H W pixels, h w = H/8 W/8.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel

from ccmdist.errors import ConfigError
from ccmdist.models.encoders import grey_of_rgb, load_text_encoder, rgb_for
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.text_encoders import MAX_KNOWN
from ccmdist.models.vae import loaded_vae

MAX_TEXT_TOKENS: Final = 512
"""Of T5, as the stock pipelines ask for; a tokenizer may take fewer."""


class WordEncoder:
    """A text encoder that sees no picture. Each text is encoded by itself, so that it does not depend on a batch.

    Args:
        name: Of the encoder, in words.
        tokenizer: That belongs to it.
        num_tokens: The length that texts are padded to.
        encode: Of one text's tokens, as the tokenizer gives them, what is wanted.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        num_tokens: int,
        encode: Callable[[BatchEncoding], Tensor],
    ) -> None:
        self.name, self.tokenizer, self.num_tokens, self._encode = name, tokenizer, num_tokens, encode
        self._remembered = lru_cache(MAX_KNOWN)(self._encoded)

    def __call__(self, text: str) -> Tensor:
        """What the encoder makes of a text; of the last few different ones it is remembered.

        Raises:
            ConfigError: If the text is longer than the encoder takes.
        """
        return self._remembered(text)

    @torch.no_grad()
    def _encoded(self, text: str) -> Tensor:
        return self._encode(self._tokens(text))

    def _tokens(self, text: str) -> BatchEncoding:
        if (count := len(self.tokenizer(text)["input_ids"])) > self.num_tokens:
            raise ConfigError(
                f"the prompt that ends in {text[-60:]!r} has {count} tokens, {self.name} takes {self.num_tokens}",
                "give its sample a shorter prompt in the shards",
            )
        return self.tokenizer([text], padding="max_length", max_length=self.num_tokens, return_tensors="pt")


class FluxPrompts:
    """Both text encoders, as diffusers' FluxKontextPipeline calls them."""

    sees_pictures = False

    def __init__(
        self,
        clip: CLIPTextModel,
        clip_tokenizer: PreTrainedTokenizerBase,
        t5: T5EncoderModel,
        t5_tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Take encoders and the tokenizers that belong to them."""
        num_tokens = min(MAX_TEXT_TOKENS, int(t5_tokenizer.model_max_length))
        self._words = WordEncoder("T5", t5_tokenizer, num_tokens, lambda of: t5(of["input_ids"].to(t5.device))[0][0])
        self._whole = WordEncoder(
            "CLIP",
            clip_tokenizer,
            int(clip_tokenizer.model_max_length),
            lambda of: clip(of["input_ids"].to(clip.device)).pooler_output[0],
        )

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "FluxPrompts":
        """The text encoders of a model folder; nothing is fetched.

        Raises:
            ModelError: If weights do not fit their config.
        """
        kinds = ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        clip, t5 = (load_text_encoder(kind, folder, name, dtype, device) for kind, name in kinds)
        tokenizers = [
            AutoTokenizer.from_pretrained(str(folder.path / name), local_files_only=True)
            for name in folder.layout.tokenizers
        ]
        return cls(clip, tokenizers[0], t5, tokenizers[1])

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """T5's embeddings of each prompt, shape (L, D) each; all of one L, padding included.

        Args:
            prompts: One per sample.
            pictures: Of each; not looked at, for no text encoder sees images.

        Raises:
            ConfigError: If a prompt is longer than T5 takes.
        """
        return [self._words(text) for text in prompts]

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """CLIP's pooled output of each prompt, shape (P,).

        Raises:
            ConfigError: If a prompt is longer than CLIP takes.
        """
        return [self._whole(text) for text in prompts]


class FluxCodec:
    """The VAE on grey frames, and on pictures that stand for their nerves: both are encoded alike."""

    def __init__(self, vae: AutoencoderKL) -> None:
        """Take a VAE; its config says how latents are shifted and scaled."""
        self.vae = vae

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "FluxCodec":
        """The VAE of a model folder; nothing is fetched.

        Raises:
            ModelError: If the weights do not fit the config.
        """
        return cls(loaded_vae(AutoencoderKL, folder, dtype, device))

    @property
    def shift(self) -> float:
        """What is taken off latents before they are scaled."""
        return float(self.vae.config.shift_factor)

    @torch.no_grad()
    def encode(self, pictures: np.ndarray) -> Tensor:
        """Normalised latents, the mode of the posterior, shape (B, C, h, w), in the VAE's dtype.

        Args:
            pictures: uint8, grey (B, H, W) or with colours (B, H, W, 3); height and width are multiples of 8.
        """
        mode = self.vae.encode(rgb_for(self.vae, pictures)).latent_dist.mode()
        return (mode - self.shift) * self.vae.config.scaling_factor

    def encode_structure(self, pictures: np.ndarray) -> Tensor:
        """Latents of what stands for the nerves; here as of images."""
        return self.encode(pictures)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames, uint8 of shape (B, H, W), of normalised latents."""
        latents = latents_BChw.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + self.shift
        return grey_of_rgb(self.vae.decode(latents).sample).cpu().numpy()
