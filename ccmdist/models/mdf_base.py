"""What MDF-MLLM begins with, as folders: a multimodal language model and a U-Net, and what identifies them.

Imports no torch. Folders are known by what is in them, wherever they lie.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from ccmdist.commit import digest_of
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings, SegmentSettings
from ccmdist.errors import OF_THE_MACHINE, ModelError
from ccmdist.models.model_folder import content_digest
from ccmdist.models.network_folder import ABOUT_FILE, read_about

REMEDY: Final = "name a local folder of Mllama or Qwen2.5-VL as `hf download` leaves it, tokenizer included"
GATED: Final = (
    "accept the licence on the model's page, then `hf download REPOSITORY --local-dir FOLDER` on a machine with "
    "internet, and copy the folder"
)
LLM: Final = "llm"
"""The language model, as a module of the whole and as a prefix of the names of its parameters."""
KINDS: Final = ("mllama", "qwen2_5_vl")
"""As config.json names them: model_type."""
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Files one of which holds the words; without any, transformers makes of Qwen's a tokenizer that reads no word."""
LARGEST_POINTER: Final = 1024
"""Bytes; a smaller weight file is what git-lfs leaves in the place of one."""
DECIDING: Final = (".json", ".txt", ".safetensors", ".model")
"""Endings of the files that decide what a model says."""


def mllm_kind(folder: Path) -> str:
    """Which of the language models a folder holds, after a check that it is no empty shell of one.

    Raises:
        ModelError: If it is missing, gated or of another kind.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: there is no such folder", REMEDY)
    file = folder / "config.json"
    if not file.is_file():
        # A gated download that was refused leaves the page's text, at most.
        raise ModelError(f"{folder}: holds no config.json", f"{GATED}; or {REMEDY}")
    try:
        config: Any = json.loads(file.read_bytes())
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise ModelError(f"{file}: {error.strerror}", REMEDY) from None
    except ValueError as error:
        raise ModelError(f"{file}: cannot be read ({error})", GATED) from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in KINDS:
        raise ModelError(f"{folder}: is a model of type {kind}, expected {' or '.join(KINDS)}", REMEDY)
    weights = list(folder.glob("*.safetensors"))
    if not weights or any(weight.stat().st_size < LARGEST_POINTER for weight in weights):
        raise ModelError(f"{folder}: holds no weights", GATED)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ModelError(f"{folder}: holds no tokenizer (none of {', '.join(TOKENIZERS)})", REMEDY)
    return str(kind)


def mllm_digest(folder: Path) -> str:
    """Identity of a folder's contents.

    Raises:
        ModelError: If it is missing, gated or of another kind.
    """
    mllm_kind(folder)
    files = [file for file in sorted(folder.iterdir()) if file.suffix in DECIDING]
    return digest_of({file.name: _content(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files})


def check_base(settings: DiagnoseSettings) -> None:
    """Refuse folders that training cannot start from, before anything of them is read that takes long.

    Raises:
        ModelError: If the language model is missing, gated or of another kind, or the U-Net is another network.
    """
    mllm_kind(settings.mllm)
    if settings.unet is None:
        return
    remedy = "name the folder `network` of a finished run of objective.kind segment"
    if not (settings.unet / ABOUT_FILE).is_file():
        raise ModelError(f"{settings.unet}: holds no {ABOUT_FILE}", remedy)
    about = read_about(settings.unet)
    if not isinstance(about.settings, SegmentSettings):
        raise ModelError(f"{settings.unet}: is a network of objective.kind {about.kind}, expected segment", remedy)
    if about.settings.channels != settings.channels:
        raise ModelError(
            f"{settings.unet}: is a U-Net of channels {list(about.settings.channels)}, the settings say "
            f"{list(settings.channels)}",
            "set `channels`, beside `unet`, to its own",
        )


def base_digest(settings: DiagnoseSettings) -> str:
    """Identity of what training starts from.

    Raises:
        ModelError: As :func:`check_base`.
    """
    check_base(settings)
    unet = None if settings.unet is None else read_about(settings.unet).digest
    return digest_of({"mllm": mllm_digest(settings.mllm), "unet": unet})


@lru_cache(maxsize=256)
def _content(file: Path, size: int, changed_ns: int) -> str:
    """Digest of a file that is read once per process, for a grid of trainings asks for it again and again."""
    return content_digest(file)
