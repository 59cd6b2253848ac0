"""Write a complete model folder with random weights, in the exact layout of a download: `model make`.

Weights are made tensor by tensor from the seed and their own name, and written file by file: the largest model
needs the memory of one file, and its bytes do not depend on the order in which tensors are made.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, cast, get_args

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from diffusers import __version__ as diffusers_version
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from ccmdist.commit import commit_bytes, commit_json, committed_file
from ccmdist.console import log
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.model_folder import WEIGHT_FILES, ModelFolder
from ccmdist.models.processor import make_processor
from ccmdist.models.sizes import NOISE_SCHEDULE, PIPELINES, SIZES, Size
from ccmdist.models.template import Version
from ccmdist.models.tokenizer import SPECIAL_TOKENS, make_tokenizer

FITTED: Final = Path(__file__).parent / "tiny"
"""Where the package keeps the fitted VAE and transformer of size tiny, each with its config.json."""


def make_model(size: str, version: str, out: Path, seed: int = 0, fitted: bool = False) -> None:
    """Write a model folder; when interrupted, the same call writes it anew.

    Args:
        size: A key of :data:`ccmdist.models.sizes.SIZES`.
        version: "v1", "2509" or "2511".
        out: Folder; must not hold a model yet.
        seed: Of the weights.
        fitted: Take the VAE and the transformer that were fitted on phantoms (tiny only). They belong to the text
            encoder of seed 0.

    Raises:
        ConfigError: If the size or version is not known, or there are no fitted weights for them.
        ModelError: If ``out`` already holds a model.
    """
    chosen, version = _requested(size, version, seed, fitted)
    if (out / "model_index.json").exists():
        raise ModelError(f"{out}: already holds a model", "choose another folder")
    tokenizer = make_tokenizer()
    commit_saved(out / "tokenizer", tokenizer.save_pretrained)
    commit_saved(out / "processor", make_processor(tokenizer, chosen.max_pixels).save_pretrained)
    commit_saved(out / "scheduler", FlowMatchEulerDiscreteScheduler(**NOISE_SCHEDULE).save_pretrained)
    for component, module in _skeletons(chosen, version, tokenizer).items():
        if fitted and component != "text_encoder":
            _copy_fitted(out, component, version)
        else:
            is_diffusers = component != "text_encoder"
            commit_saved(out / component, module.save_config if is_diffusers else module.config.save_pretrained)
            _write_random(out / component, WEIGHT_FILES[component], module, chosen.bytes_per_file, seed)
    # Last, for it makes the folder a model.
    commit_json(out / "model_index.json", _model_index(version))
    ModelFolder.open(out)
    log.info("%s: %s model of size %s, version %s", out, "fitted" if fitted else "random", size, version)


def make_transformer(size: Size, version: Version) -> QwenImageTransformer2DModel:
    """The MMDiT of a size, randomly initialised by its class, on the default device."""
    return QwenImageTransformer2DModel(**size.transformer, zero_cond_t=version == "2511")


def make_vae(size: Size) -> AutoencoderKLQwenImage:
    """The VAE of a size, randomly initialised by its class, on the default device."""
    return AutoencoderKLQwenImage(**size.vae)


def text_config(size: Size, tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLConfig:
    """Configuration of the vision-language encoder of a size, with the ids of this tokenizer."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {"vocab_size": len(tokenizer)} | size.text
    sections = text.pop("mrope_section")
    return Qwen2_5_VLConfig(
        text_config=text
        | {
            "rope_parameters": {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={"window_size": 112, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | size.vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="bfloat16",
    )


def random_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """A bf16 weight that depends on its name, its shape and the seed alone.

    Gains of norms are 1 and biases 0; other weights are normal with variance 1 / fan-in.
    """
    if name.endswith("bias"):
        return torch.zeros(shape, dtype=torch.bfloat16)
    if len(shape) < 2 or name.endswith("gamma"):
        return torch.ones(shape, dtype=torch.bfloat16)
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randn(shape, generator=source, dtype=torch.bfloat16).div_(math.sqrt(math.prod(shape[1:])))


def write_parts(folder: Path, stem: str, parts: Iterable[dict[str, torch.Tensor]], num_parts: int) -> None:
    """Write weights as one safetensors file, or as several with an index, as diffusers and transformers do.

    Args:
        folder: Of the component.
        stem: Name of the file without number and suffix.
        parts: Tensors by name, file by file.
        num_parts: How many files there will be.
    """
    places: dict[str, str] = {}
    num_bytes = index = 0
    for tensors in parts:
        index += 1  # noqa: SIM113  `enumerate` would keep the tensors of the file before
        file = f"{stem}{f'-{index:05d}-of-{num_parts:05d}' if num_parts > 1 else ''}.safetensors"
        with committed_file(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        del tensors  # before the next ones are made
    if num_parts > 1:
        weight_map = {"metadata": {"total_size": num_bytes}, "weight_map": places}
        commit_json(folder / f"{stem}.safetensors.index.json", weight_map)


def parts_of(shapes: dict[str, torch.Size], bytes_per_file: int) -> list[list[str]]:
    """Names of bf16 tensors, file by file: no file exceeds the limit unless a single tensor does."""
    parts: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        num_bytes = 2 * shape.numel()
        if parts[-1] and used + num_bytes > bytes_per_file:
            parts.append([])
            used = 0
        parts[-1].append(name)
        used += num_bytes
    return parts


def _requested(size: str, version: str, seed: int, fitted: bool) -> tuple[Size, Version]:
    if size not in SIZES:
        raise ConfigError(f"--size: {size!r} is not known", f"use one of {', '.join(SIZES)}")
    if version not in get_args(Version):
        raise ConfigError(f"--version: {version!r} is not known", f"use one of {', '.join(get_args(Version))}")
    if fitted and (size != "tiny" or seed != 0):
        raise ConfigError(
            f"--fitted: there are no fitted weights of size {size} with seed {seed}",
            "use --size tiny --seed 0, or make it without --fitted",
        )
    for component in ("vae", "transformer"):
        if fitted and not (FITTED / component / "config.json").is_file():
            raise ConfigError(
                f"--fitted: {FITTED / component} holds no fitted weights",
                "make them with `ccmdist model fit`, or make the model without --fitted",
            )
    return SIZES[size], cast(Version, version)


def _skeletons(size: Size, version: Version, tokenizer: Qwen2Tokenizer) -> dict[str, torch.nn.Module]:
    with torch.device("meta"):
        return {
            "transformer": make_transformer(size, version),
            "vae": make_vae(size),
            "text_encoder": Qwen2_5_VLForConditionalGeneration(text_config(size, tokenizer)),
        }


def _write_random(folder: Path, stem: str, module: torch.nn.Module, bytes_per_file: int, seed: int) -> None:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    names = parts_of(shapes, bytes_per_file)
    parts = ({name: random_tensor(name, shapes[name], seed) for name in part} for part in names)
    write_parts(folder, stem, parts, len(names))


def _copy_fitted(out: Path, component: str, version: Version) -> None:
    for file in sorted((FITTED / component).iterdir()):
        commit_bytes(out / component / file.name, file.read_bytes())
    if component == "transformer":
        config = json.loads((FITTED / component / "config.json").read_text())
        commit_json(out / component / "config.json", config | {"zero_cond_t": version == "2511"})


def commit_saved(folder: Path, save: Callable[[str], Any]) -> None:
    """Commit the small files that a library's ``save`` writes into a folder."""
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        save(temporary)
        for file in sorted(Path(temporary).iterdir()):
            # A download names the class that every reader has, not our subclass of it.
            text = file.read_text().replace('"ImageTextProcessor"', '"Qwen2VLProcessor"')
            commit_bytes(folder / file.name, text.encode())


def _model_index(version: Version) -> dict[str, Any]:
    return {
        "_class_name": PIPELINES[version],
        "_diffusers_version": diffusers_version,
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
