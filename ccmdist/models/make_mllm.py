"""Write a tiny multimodal language model with random weights, in the layout of a download: for trials and tests."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

from ccmdist.commit import commit_bytes
from ccmdist.errors import ModelError
from ccmdist.models.make import commit_saved, random_tensor, text_config
from ccmdist.models.sizes import SIZES
from ccmdist.models.tokenizer import make_tokenizer

CONFIG: Final = "config.json"
MLLAMA_TEXT: Final = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "cross_attention_layers": [1, 3],
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
MLLAMA_VISION: Final = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 56,
    "patch_size": 14,
    "max_num_tiles": 1,
    "supported_aspect_ratios": [[1, 1]],
    "intermediate_layers_indices": [0, 1],
    "vision_output_dim": 96,
}


def make_mllm(kind: str, out: Path, seed: int = 0) -> None:
    """Write config, weights and tokenizer; when interrupted, the same call writes them anew.

    Args:
        kind: "mllama" or "qwen2_5_vl".
        out: Folder; must not hold a model yet.
        seed: Of the weights.

    Raises:
        ModelError: If ``out`` already holds a model.
    """
    if (out / CONFIG).exists():
        raise ModelError(f"{out}: already holds a model", "choose another folder")
    tokenizer = make_tokenizer()
    model = TINY[kind](tokenizer).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains and gates are 1: a gate of 0, as transformers has it at first, would hide the image.
            parameter.copy_(random_tensor(name, parameter.shape, seed).float())
    commit_saved(out, tokenizer.save_pretrained)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        model.save_pretrained(temporary)
        # The config last, for it makes the folder a model.
        for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == CONFIG):
            commit_bytes(out / file.name, file.read_bytes())


def _mllama(tokenizer: Any) -> nn.Module:
    special = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    ids = {"pad_token_id": special, "bos_token_id": special, "eos_token_id": special}
    text = MLLAMA_TEXT | ids | {"vocab_size": len(tokenizer)}
    return MllamaForConditionalGeneration(
        MllamaConfig(vision_config=MLLAMA_VISION, text_config=text, image_token_index=len(tokenizer))
    )


def _qwen(tokenizer: Any) -> nn.Module:
    return Qwen2_5_VLForConditionalGeneration(text_config(SIZES["tiny"], tokenizer))


TINY: Final[Mapping[str, Callable[[Any], nn.Module]]] = {"mllama": _mllama, "qwen2_5_vl": _qwen}
"""Kind -> its tiny model."""
