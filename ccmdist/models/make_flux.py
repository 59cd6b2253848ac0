"""A complete folder of FLUX.1 Kontext or Control with random weights, small enough for a CPU: for trials alone.

Its tokenizers are made on the spot, of the classes that the published folder has.
"""

import json
import re
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers import __version__ as diffusers_version
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import FIELD_WORDS, prompt
from ccmdist.commit import commit_json
from ccmdist.errors import ModelError
from ccmdist.models.layout import FLUX
from ccmdist.models.make import commit_saved, random_tensor, write_parts
from ccmdist.models.model_folder import ModelFolder

NUM_TEXT_TOKENS: Final = 64
"""T5's, of all prompts; the published model has 512."""
WIDTHS: Final = {"text": 32, "pooled": 32}
TRANSFORMER: Final = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTHS["text"],
    "pooled_projection_dim": WIDTHS["pooled"],
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
CONTROL: Final = {"in_channels": 128, "out_channels": 64}
VAE: Final = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
NOISE_SCHEDULE: Final = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
"""As published."""


def make_flux(out: Path, seed: int = 0, is_control: bool = False) -> None:
    """Write the folder; when interrupted, the same call writes it anew.

    Args:
        out: Folder; must not hold a model yet.
        seed: Of the weights.
        is_control: Of FLUX.1 Control, whose condition image comes as channels; else of Kontext.

    Raises:
        ModelError: If ``out`` already holds a model.
    """
    if (out / "model_index.json").exists():
        raise ModelError(f"{out}: already holds a model", "choose another folder")
    clip_tokenizer, t5_tokenizer = make_clip_tokenizer(), make_t5_tokenizer()
    commit_saved(out / "tokenizer", clip_tokenizer.save_pretrained)
    commit_saved(out / "tokenizer_2", t5_tokenizer.save_pretrained)
    commit_saved(out / "scheduler", FlowMatchEulerDiscreteScheduler(**NOISE_SCHEDULE).save_pretrained)
    with torch.device("meta"):
        components: dict[str, Any] = {
            "transformer": FluxTransformer2DModel(**TRANSFORMER | (CONTROL if is_control else {})),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(clip_config(clip_tokenizer)),
            "text_encoder_2": T5EncoderModel(_t5_config(t5_tokenizer)),
        }
    for component, module in components.items():
        save_config = module.save_config if hasattr(module, "save_config") else module.config.save_pretrained
        commit_saved(out / component, save_config)
        write_random(out / component, FLUX.weight_files[component], module, seed)
    # Last, for it makes the folder a model.
    commit_json(out / "model_index.json", _model_index(components, is_control))
    ModelFolder.open(out, "flux_control" if is_control else "flux")


def make_clip_tokenizer() -> CLIPTokenizer:
    """A byte-level BPE with a token for every word of our prompts; the same on every call."""
    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank._tokenizer.normalizer, blank._tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        # Else they get their numbers, which decide between equal merges, in an order that changes with the process.
        special_tokens=[f"{letter}</w>" for letter in alphabet],
    )
    trained.train_from_iterator(_texts(), trainer)
    learnt = json.loads(trained.to_str())["model"]
    ids = learnt["vocab"]
    ids |= {"<|startoftext|>": len(ids), "<|endoftext|>": len(ids) + 1}
    return CLIPTokenizer(vocab=ids, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)


def make_t5_tokenizer() -> T5Tokenizer:
    """A unigram model with a piece for every word of our prompts, and one for every character of ASCII."""
    words = sorted({word for text in _texts() for word in re.findall(r"\S+", text)})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words)]
    characters = ["▁", *map(chr, range(33, 127))]
    return T5Tokenizer(
        vocab=pieces + [(character, -8.0) for character in characters],
        model_max_length=NUM_TEXT_TOKENS,
        extra_ids=0,
    )


def _texts() -> list[str]:
    prompts = [prompt(group, {}) for group in (None, *CLINICAL_GROUPS)]
    return prompts + [words for codes in FIELD_WORDS.values() for words in codes.values()]


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Of a small CLIP text model, with the ids of this tokenizer."""
    first, last = tokenizer.convert_tokens_to_ids(["<|startoftext|>", "<|endoftext|>"])
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS["pooled"],
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=first,
        eos_token_id=last,  # the pooled output is that of this token
        pad_token_id=last,
        architectures=["CLIPTextModel"],
    )


def _t5_config(tokenizer: T5Tokenizer) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTHS["text"],
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        architectures=["T5EncoderModel"],
    )


def write_random(folder: Path, stem: str, module: nn.Module, seed: int) -> None:
    """Write random weights of a module without any, which depend on their names and the seed alone."""
    # Parameters that a module has under two names are written once, as transformers does.
    tensors = {name: random_tensor(name, weight.shape, seed) for name, weight in module.named_parameters()}
    write_parts(folder, stem, [tensors], 1)


def _model_index(components: dict[str, Any], is_control: bool) -> dict[str, Any]:
    classes = {
        name: [type(module).__module__.split(".")[0], type(module).__name__] for name, module in components.items()
    }
    absent = {} if is_control else {"image_encoder": [None, None], "feature_extractor": [None, None]}
    return {
        "_class_name": "FluxControlPipeline" if is_control else "FluxKontextPipeline",
        "_diffusers_version": diffusers_version,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        **absent,
        **classes,
    }
