"""The encoders of a model folder, of whatever kind it is: the one table. What a kind needs is imported when chosen."""

from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from ccmdist.config.objectives.objective import ModelKind
from ccmdist.models.model_folder import ModelFolder


class PromptEncoding(Protocol):
    """Prompts, and for some models the pictures beside them, to embeddings."""

    @property
    def sees_pictures(self) -> bool:
        """Whether embeddings depend on the picture; else they are the same for all samples of a prompt."""
        ...

    def encode(self, prompts: list[str], pictures: list[np.ndarray]) -> list[Tensor]:
        """Embeddings of each prompt with its picture, uint8 (H, W) or (H, W, 3); shape (L, D) each."""
        ...

    def pooled(self, prompts: list[str]) -> list[Tensor | None]:
        """What a second encoder makes of each prompt as a whole, shape (P,); None where a model has none."""
        ...


class PictureEncoding(Protocol):
    """Pictures to latents and back; all uint8, grey (B, H, W) or with colours (B, H, W, 3)."""

    def encode(self, pictures: np.ndarray) -> Tensor:
        """Latents of images, with a standard deviation of about one."""
        ...

    def encode_structure(self, pictures: np.ndarray) -> Tensor:
        """Latents of what stands for the nerves, as the model is given them."""
        ...

    def decode(self, latents_BChw: Tensor) -> np.ndarray:
        """Grey frames of latents of images."""
        ...


Encoding = tuple[PromptEncoding, PictureEncoding]
Loaders = tuple[
    Callable[[ModelFolder, torch.dtype, torch.device | str], PromptEncoding],
    Callable[[ModelFolder, torch.dtype, torch.device | str], PictureEncoding],
]


def load_encoders(folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> Encoding:
    """Both encoders of a model folder; nothing is fetched.

    Raises:
        ModelError: If weights do not fit their config.
    """
    load_prompts, load_pictures = ENCODERS[folder.kind]()
    return load_prompts(folder, dtype, device), load_pictures(folder, dtype, device)


def load_codec(folder: ModelFolder, dtype: torch.dtype, device: torch.device | str) -> PictureEncoding:
    """The VAE of a model folder; nothing is fetched.

    Raises:
        ModelError: If the weights do not fit the config.
    """
    return ENCODERS[folder.kind]()[1](folder, dtype, device)


def _qwen() -> Loaders:
    from ccmdist.models.encoders import LatentCodec, PromptEncoder

    return PromptEncoder.load, LatentCodec.load


def _msdm() -> Loaders:
    from ccmdist.models.msdm import MsdmCodec, load_text_encoder

    return load_text_encoder, MsdmCodec.load


def _flux() -> Loaders:
    from ccmdist.models.flux_encoders import FluxCodec, FluxPrompts

    return FluxPrompts.load, FluxCodec.load


def _kandinsky() -> Loaders:
    from ccmdist.models.kandinsky_encoders import KandinskyCodec, KandinskyPrompts

    return KandinskyPrompts.load, KandinskyCodec.load


ENCODERS: Final[dict[ModelKind, Callable[[], Loaders]]] = {
    "qwen": _qwen,
    "msdm": _msdm,
    "flux": _flux,
    "flux_control": _flux,
    "kandinsky5": _kandinsky,
}
