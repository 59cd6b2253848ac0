"""Multimodal language models that MDF-MLLM fuses into, without their heads: Mllama and Qwen2.5-VL, in one table.

Inputs are made in torch from a batch of grey images: no picture goes through the host's imaging library at every step.

Shape suffixes: B samples, L text tokens, P patches, T tiles, H W rows and columns.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from ccmdist.errors import ModelError
from ccmdist.models.building import with_weights
from ccmdist.models.checkpoint_io import OnRows
from ccmdist.models.mdf_base import REMEDY, mllm_kind

MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
SD: Final = (0.26862954, 0.26130258, 0.27577711)
"""Of the channels, as the image processors of both have them (CLIP's)."""
NUM_DEPTHS: Final = 4
"""Layers that levels of the U-Net are fused into."""
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
LINEARS_OF: Final = "language_model.layers."
"""Linears with an adapter lie below."""


@dataclass(frozen=True)
class MllmSpec:
    """What differs between the models.

    Attributes:
        model: Its class in transformers.
        module_name: Name of a tensor in its files -> that in the model; None for its head, which is of no use here.
        depths: (text config) -> indices of the decoder layers that read levels, from fine to coarse.
        prefix: (config, image_size_px) -> token ids of the image, before the prompt.
        inputs: (config, images in [0, 1], token ids) -> the other arguments of the model.
    """

    model: str
    module_name: Callable[[str], str | None]
    depths: Callable[[Any], tuple[int, ...]]
    prefix: Callable[[Any, int], list[int]]
    inputs: Callable[[Any, Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Mllm:
    """A model, and how it is called.

    Attributes:
        model: Of transformers, without a head: it gives states.
        config: Its own; DeepSpeed puts another in the model's place.
        tokenizer: Of its folder.
        spec: Of its kind.
    """

    model: nn.Module
    config: Any
    tokenizer: Any
    spec: MllmSpec

    @property
    def hidden_size(self) -> int:
        """Width of its states."""
        return int(self.config.text_config.hidden_size)

    def fusion_layers(self) -> list[nn.Module]:
        """The decoder layers that read levels, from fine to coarse; where there are few, one reads several."""
        layers = self.model.language_model.layers
        return [layers[depth] for depth in self.spec.depths(self.config.text_config)]

    def linear_names(self) -> list[str]:
        """Names of all linears of the decoder's layers."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(LINEARS_OF)
        ]

    def states(self, images_B1HW: Tensor, ids_BL: Tensor) -> Tensor:
        """States of the last layer, (B, L, D), of images in [-1, 1] and token ids."""
        dtype = next(self.model.parameters()).dtype
        inputs = self.spec.inputs(self.config, (images_B1HW + 1) / 2, ids_BL)
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        found: Tensor = self.model(input_ids=ids_BL, use_cache=False, **inputs).last_hidden_state
        return found


class Prompts:
    """Prompts as token ids, all of one length: what is padded stands behind the last token, which sees none of it."""

    def __init__(self, folder: Path, texts: list[str], image_size_px: int) -> None:
        """Tokenise all texts that there are, with the tokenizer of a model's folder.

        Raises:
            ModelError: If the folder cannot be used, or a text is longer than the model takes.
        """
        config, spec = _config(folder)
        tokenizer, prefix = _tokenizer(folder), spec.prefix(config, image_size_px)
        ids = {text: prefix + tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts}
        longest = max(ids.values(), key=len)
        if len(longest) > (most := config.text_config.max_position_embeddings):
            raise ModelError(
                f"{folder}: prompt and image take {len(longest)} tokens, the model takes {most}",
                "use smaller images, or another model",
            )
        self._ids = {
            text: torch.tensor(found + [found[-1]] * (len(longest) - len(found))) for text, found in ids.items()
        }
        self._last = {text: len(found) - 1 for text, found in ids.items()}

    def of(self, text: str) -> dict[str, Tensor]:
        """``prompt_ids`` (L,) and ``prompt_last``, the place of the last token, of a text."""
        return {"prompt_ids": self._ids[text], "prompt_last": torch.tensor(self._last[text])}


def load_mllm(folder: Path, dtype: torch.dtype) -> Mllm:
    """The model of a local folder, whole and on the CPU; nothing is fetched. Errors as of both parts."""
    mllm = mllm_without_weights(folder)
    read_weights(mllm, folder, dtype)
    return mllm


def mllm_without_weights(folder: Path) -> Mllm:
    """The model of a local folder, its parameters without memory.

    Raises:
        ModelError: If it is missing, gated or of another kind.
    """
    config, spec = _config(folder)
    try:
        with init_empty_weights():
            model = getattr(transformers, spec.model)(config)
    except ValueError as error:
        raise ModelError(f"{folder}: its config.json makes no model ({_told(error)})", REMEDY) from None
    model.config.use_cache = False
    return Mllm(model, config, _tokenizer(folder), spec)


def read_weights(
    mllm: Mllm,
    folder: Path,
    dtype: torch.dtype,
    zero_config: dict[str, Any] | None = None,
    on_rows: OnRows | None = None,
) -> None:
    """Give a model without weights those of its folder.

    Args:
        mllm: Of :func:`mllm_without_weights`; changed in place.
        folder: Of the same model.
        dtype: Of the weights.
        zero_config: A DeepSpeed configuration: each rank reads and keeps its share (collective). None: the whole model
            in this process, on the CPU.
        on_rows: Told the rows of all weights on the way.

    Raises:
        ModelError: If the weights are cut short, or do not fit the config.
    """
    stored = _stored_names(folder)
    stored_as = {name: old for old in stored if (name := mllm.spec.module_name(old)) is not None}
    files = {name: stored[old] for name, old in stored_as.items()}
    with_weights(mllm.model, files, dtype, zero_config, on_rows, stored_as=stored_as)


def _stored_names(folder: Path) -> dict[str, Path]:
    """Name of each tensor in the files of a folder -> the file."""
    index = folder / WEIGHTS_INDEX
    try:
        places = json.loads(index.read_bytes())["weight_map"].values() if index.is_file() else ()
        files = [folder / name for name in sorted(set(places))] or sorted(folder.glob("*.safetensors"))
        found: dict[str, Path] = {}
        for file in files:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: {error}, as {WEIGHTS_INDEX} has it", REMEDY) from None
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{folder}: cannot be read ({_told(error)})", REMEDY) from None
    return found


def _mllama_name(stored: str) -> str | None:
    """As released the language model has its head beside it; transformers 5 may write one level more."""
    name = stored.removeprefix("model.")
    if name.endswith("lm_head.weight"):
        return None
    return name.replace("language_model.model.", "language_model.", 1)


def _qwen_name(stored: str) -> str | None:
    """As released the language model is `model` and vision `visual`; transformers 5 may write one level more."""
    if stored == "lm_head.weight":
        return None
    name = stored.removeprefix("model.")
    return name if name.startswith(("visual.", "language_model.")) else f"language_model.{name}"


def _config(folder: Path) -> tuple[Any, MllmSpec]:
    kind = mllm_kind(folder)
    try:
        return AutoConfig.from_pretrained(str(folder), local_files_only=True), MLLMS[kind]
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{folder}: its config.json cannot be read ({_told(error)})", REMEDY) from None


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be read ({_told(error)})", REMEDY) from None


def _told(error: Exception) -> str:
    """What a library says, of which the first line may say only that something is wrong."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def _normalised(images_B1HW: Tensor, edge_px: int) -> Tensor:
    """Images in [0, 1] as three normed channels, (B, 3, edge, edge)."""
    if images_B1HW.shape[-1] != edge_px:
        images_B1HW = F.interpolate(images_B1HW, (edge_px, edge_px), mode="bicubic", antialias=True).clamp(0, 1)
    mean, sd = (images_B1HW.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, SD))
    return (images_B1HW - mean) / sd


def _mllama_depths(text: Any) -> tuple[int, ...]:
    """Evenly over the layers that attend to the image: 3, 13, 23, 33 of the published 11 B."""
    crossing = sorted(text.cross_attention_layers)
    return tuple(crossing[k * len(crossing) // NUM_DEPTHS] for k in range(NUM_DEPTHS))


def _mllama_prefix(config: Any, image_size_px: int) -> list[int]:
    return [config.image_token_index, config.text_config.bos_token_id]


def _mllama_inputs(config: Any, images_B1HW: Tensor, ids_BL: Tensor) -> dict[str, Tensor]:
    """The image as the first of the tiles; there are no others."""
    vision, num = config.vision_config, len(images_B1HW)
    pixels_B3HW = _normalised(images_B1HW, vision.image_size)
    pixels = pixels_B3HW.new_zeros(num, 1, vision.max_num_tiles, *pixels_B3HW.shape[1:])
    pixels[:, 0, 0] = pixels_B3HW
    is_tile_T = torch.zeros(vision.max_num_tiles, dtype=torch.long, device=ids_BL.device)
    is_tile_T[0] = 1
    square = 1 + [list(ratio) for ratio in vision.supported_aspect_ratios].index([1, 1])
    return {
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.full((num, 1), square, device=ids_BL.device),
        "aspect_ratio_mask": is_tile_T.expand(num, 1, -1),
        "cross_attention_mask": is_tile_T.expand(num, ids_BL.shape[1], 1, -1),
    }


def _qwen_depths(text: Any) -> tuple[int, ...]:
    """Evenly over all layers, for none attends to the image alone: 6, 13, 20, 27 of the published 7 B."""
    return tuple(math.ceil((k + 1) * text.num_hidden_layers / NUM_DEPTHS) - 1 for k in range(NUM_DEPTHS))


def _qwen_edge_px(config: Any, image_size_px: int) -> int:
    """The nearest edge of which vision makes whole tokens."""
    token_px = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    return int(max(round(image_size_px / token_px), 2) * token_px)


def _qwen_prefix(config: Any, image_size_px: int) -> list[int]:
    token_px = config.vision_config.patch_size * config.vision_config.spatial_merge_size
    num_tokens = (_qwen_edge_px(config, image_size_px) // token_px) ** 2
    return [config.vision_start_token_id, *[config.image_token_id] * num_tokens, config.vision_end_token_id]


def _qwen_inputs(config: Any, images_B1HW: Tensor, ids_BL: Tensor) -> dict[str, Tensor]:
    """Patches in the order of its image processor: those of one token side by side; a still is shown twice."""
    vision, num = config.vision_config, len(images_B1HW)
    merge, patch, times = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    pixels_B3HW = _normalised(images_B1HW, edge := _qwen_edge_px(config, images_B1HW.shape[-1]))
    tokens = edge // patch // merge
    parts = pixels_B3HW.reshape(num, 3, tokens, merge, patch, tokens, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = parts.unsqueeze(-3).expand(*parts.shape[:-2], times, patch, patch)
    return {
        "pixel_values": patches.reshape(num * (edge // patch) ** 2, -1),
        "image_grid_thw": torch.tensor([[1, edge // patch, edge // patch]] * num, device=ids_BL.device),
        "mm_token_type_ids": (ids_BL == config.image_token_id).int(),
    }


MLLMS: Final[Mapping[str, MllmSpec]] = {
    "mllama": MllmSpec("MllamaModel", _mllama_name, _mllama_depths, _mllama_prefix, _mllama_inputs),
    "qwen2_5_vl": MllmSpec("Qwen2_5_VLModel", _qwen_name, _qwen_depths, _qwen_prefix, _qwen_inputs),
}
