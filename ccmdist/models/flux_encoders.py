"""The frozen encoders of FLUX.1: T5 for the words of a prompt, CLIP for the prompt as a whole, and its VAE.

Neither text encoder sees a picture. T5's embeddings are padded to one length, and the transformer attends to the
padding: so it was trained, and so the stock pipelines call it.

Shape suffixes: B samples, L text tokens, D text width, C latent channels, H W pixels, h w = H/8 W/8.
"""

from typing import Any, Final

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, CLIPTextModel, PreTrainedTokenizerBase, T5EncoderModel
from transformers.utils import logging

from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.encoders import grey_of_rgb, rgb_of_grey, scaled_rgb
from ccmdist.models.model_folder import ModelFolder

MAX_TEXT_TOKENS: Final = 512
"""Of T5, as the stock pipelines ask for; a tokenizer may take fewer."""


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
        self.clip, self.clip_tokenizer, self.t5, self.t5_tokenizer = clip, clip_tokenizer, t5, t5_tokenizer
        self._known: dict[tuple[str, str], Tensor] = {}

    @classmethod
    def load(cls, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> "FluxPrompts":
        """The text encoders of a model folder; nothing is fetched.

        Raises:
            ModelError: If weights do not fit their config. Those that are missing transformers would draw at random.
        """
        logging.disable_progress_bar()
        clip, t5 = (
            load_text_encoder(kind, folder, component, dtype).to(device).eval().requires_grad_(False)
            for kind, component in ((CLIPTextModel, "text_encoder"), (T5EncoderModel, "text_encoder_2"))
        )
        tokenizers = [
            AutoTokenizer.from_pretrained(str(folder.path / name), local_files_only=True)
            for name in folder.layout.tokenizers
        ]
        return cls(clip, tokenizers[0], t5, tokenizers[1])

    @property
    def num_tokens(self) -> int:
        """L, the length of every encoded text, padding included."""
        return min(MAX_TEXT_TOKENS, int(self.t5_tokenizer.model_max_length))

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """T5's embeddings of each prompt, shape (L, D) each.

        Args:
            prompts: One per sample.
            pictures: Of each; not looked at, for no text encoder sees images.

        Raises:
            ConfigError: If a prompt is longer than T5 takes.
        """
        return [self._once("T5", text, lambda ids_1L: self.t5(ids_1L)[0][0]) for text in prompts]

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """CLIP's pooled output of each prompt, shape (P,).

        Raises:
            ConfigError: If a prompt is longer than CLIP takes.
        """
        return [self._once("CLIP", text, lambda ids_1L: self.clip(ids_1L).pooler_output[0]) for text in prompts]

    @torch.no_grad()
    def _once(self, name: str, text: str, encode: Any) -> Tensor:
        """Of one prompt by itself, so that it does not depend on a batch; of equal ones, and there are few, once."""
        if (known := self._known.get((name, text))) is not None:
            return known
        tokenizer, limit = (
            (self.t5_tokenizer, self.num_tokens)
            if name == "T5"
            else (self.clip_tokenizer, int(self.clip_tokenizer.model_max_length))
        )
        given = padded(tokenizer, text, limit, name)["input_ids"]
        return self._known.setdefault((name, text), encode(given.to(self.t5.device)))


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
        with no_init_weights():
            vae = AutoencoderKL.from_config(folder.config("vae"))
        torch.nn.Module.to(vae, device, dtype)
        load_weights(vae, folder.weight_files("vae"))
        return cls(vae.eval())

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
        given = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.vae.device)
        rgb = rgb_of_grey(given) if given.dim() == 3 else scaled_rgb(given)
        mode = self.vae.encode(rgb.to(self.vae.dtype)).latent_dist.mode()
        return (mode - self.shift) * self.vae.config.scaling_factor

    def encode_structure(self, pictures: np.ndarray) -> Tensor:
        """Latents of what stands for the nerves; here as of images."""
        return self.encode(pictures)

    @torch.no_grad()
    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames, uint8 of shape (B, H, W), of normalised latents."""
        latents = latents_BChw.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor + self.shift
        return grey_of_rgb(self.vae.decode(latents).sample).cpu().numpy()


def padded(tokenizer: PreTrainedTokenizerBase, text: str, limit: int, name: str) -> BatchEncoding:
    """A prompt's tokens, padded to the length that an encoder takes.

    Raises:
        ConfigError: If there are more.
    """
    if (count := len(tokenizer(text)["input_ids"])) > limit:
        raise ConfigError(
            f"the prompt that ends in {text[-60:]!r} has {count} tokens, {name} takes {limit}",
            "give its sample a shorter prompt in the shards",
        )
    return tokenizer([text], padding="max_length", max_length=limit, return_tensors="pt")


def load_text_encoder(kind: Any, folder: ModelFolder, component: str, dtype: torch.dtype) -> Any:
    """An encoder of a class of transformers from a folder's component.

    Raises:
        ModelError: If weights do not fit the config. Those that are missing transformers would draw at random.
    """
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
    return encoder
