"""A complete folder of Kandinsky 5 I2I with random weights, small enough for a CPU: for trials alone."""

from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from diffusers import __version__ as diffusers_version
from transformers import CLIPTextModel, Qwen2_5_VLForConditionalGeneration

from ccmdist.commit import commit_json
from ccmdist.errors import ModelError
from ccmdist.models.layout import KANDINSKY
from ccmdist.models.make import commit_saved, text_config
from ccmdist.models.make_flux import VAE, WIDTHS, clip_config, make_clip_tokenizer, write_random
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import make_processor
from ccmdist.models.sizes import SIZES
from ccmdist.models.template import KANDINSKY_AFTER, KANDINSKY_BEFORE
from ccmdist.models.tokenizer import make_tokenizer

TRANSFORMER: Final = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": SIZES["tiny"].text["hidden_size"],
    "in_text_dim2": WIDTHS["pooled"],
    "time_dim": 32,
    "model_dim": 32,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
}
SHIFT: Final = 5.0
"""Of noise levels; a value of ours."""


def make_kandinsky(out: Path, seed: int = 0) -> None:
    """Write the folder; when interrupted, the same call writes it anew.

    Args:
        out: Folder; must not hold a model yet.
        seed: Of the weights.

    Raises:
        ModelError: If ``out`` already holds a model.
    """
    if (out / "model_index.json").exists():
        raise ModelError(f"{out}: already holds a model", "choose another folder")
    tokenizer, clip_tokenizer = make_tokenizer(KANDINSKY_BEFORE, KANDINSKY_AFTER), make_clip_tokenizer()
    commit_saved(out / "tokenizer", make_processor(tokenizer, SIZES["tiny"].max_pixels).save_pretrained)
    commit_saved(out / "tokenizer_2", clip_tokenizer.save_pretrained)
    commit_saved(out / "scheduler", FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained)
    with torch.device("meta"):
        components: dict[str, Any] = {
            "vae": AutoencoderKL(**VAE),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(text_config(SIZES["tiny"], tokenizer)),
            "text_encoder_2": CLIPTextModel(clip_config(clip_tokenizer)),
        }
    components["transformer"] = Kandinsky5Transformer3DModel(**TRANSFORMER)  # computes with its tables as it is made
    for component, module in components.items():
        save_config = module.save_config if hasattr(module, "save_config") else module.config.save_pretrained
        commit_saved(out / component, save_config)
        write_random(out / component, KANDINSKY.weight_files[component], module, seed)
    # Last, for it makes the folder a model.
    commit_json(
        out / "model_index.json",
        {
            "_class_name": "Kandinsky5I2IPipeline",
            "_diffusers_version": diffusers_version,
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
            "text_encoder_2": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "Qwen2VLProcessor"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "transformer": ["diffusers", "Kandinsky5Transformer3DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    )
    ModelFolder.open(out, "kandinsky5")
