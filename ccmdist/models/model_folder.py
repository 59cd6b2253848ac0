"""A model in diffusers layout, of Qwen-Image-Edit or MSDM: is it complete, which is it, what identifies it.

Imports no torch. Kind and version are read off the folder itself, never off a flag, and what `model make` writes is
treated like a download.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ccmdist.commit import digest_of, sha256_of_file
from ccmdist.config.objectives import ModelKind
from ccmdist.errors import OF_THE_MACHINE, ModelError
from ccmdist.models.template import CONDITION_EDGE_PX, NUM_DROPPED_TOKENS, Version, template_digest

WEIGHT_FILES: Final = {
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
"""Components that have weights, and how diffusers and transformers name their files."""

REQUIRED: Final = (
    ("scheduler/scheduler_config.json",),
    ("processor/preprocessor_config.json", "processor/processor_config.json"),
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.json"),
    ("tokenizer/tokenizer.json", "tokenizer/merges.txt"),
)
"""Small files; of each line one has to be there."""

MSDM_WEIGHT_FILES: Final = {"vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The U-Net, `unet`, is there once stage two is trained; a cache is filled without it."""

MSDM_REQUIRED: Final = (
    ("scheduler/scheduler_config.json",),
    ("tokenizer/tokenizer_config.json",),
    ("tokenizer/tokenizer.json", "tokenizer/vocab.txt", "tokenizer/vocab.json"),
)

MSDM_PIPELINES: Final = ("StableDiffusionPipeline", "StableDiffusionInstructPix2PixPipeline")
"""Stock pipelines that draw with an MSDM: without a nerve mask, and with one."""

MSDM_CALL_VERSION: Final = 1
"""Raised when our call of MSDM's encoders changes what it returns; part of every cache's fingerprint."""

MSDM_ADVICE: Final = (
    "give the folder `network` of a finished run of `ccmdist train configs/train/wdlora.yaml "
    "configs/train/msdm_vae.yaml`"
)
NAMES: Final[dict[ModelKind, str]] = {"qwen": "Qwen-Image-Edit", "msdm": "MSDM"}

REPOSITORIES: Final[dict[Version, str]] = {
    "v1": "Qwen/Qwen-Image-Edit",
    "2509": "Qwen/Qwen-Image-Edit-2509",
    "2511": "Qwen/Qwen-Image-Edit-2511",
}
MAX_WHOLE_FILE_BYTES: Final = 256 << 20
SAMPLE_BYTES, NUM_SAMPLES = 1 << 20, 64
MAX_HEADER_BYTES: Final = 100 << 20


@dataclass(frozen=True)
class ModelFolder:
    """A complete model folder.

    Attributes:
        path: The folder.
        edit_version: Of Qwen-Image-Edit; None for an MSDM.
    """

    path: Path
    edit_version: Version | None

    @classmethod
    def open(cls, path: Path, kind: ModelKind | None = None) -> "ModelFolder":
        """The model in ``path``, after a check that every file is there and has all its bytes.

        Args:
            path: The folder.
            kind: Of models that will do; None if all do.

        Raises:
            ModelError: If a file is missing or cannot be read, or the model is of another kind.
        """
        folder = cls(path, _version(path))
        if kind is not None and folder.kind != kind:
            raise folder._is_other(kind)
        for choices in REQUIRED if folder.kind == "qwen" else MSDM_REQUIRED:
            if not any((path / choice).is_file() for choice in choices):
                raise folder._missing(choices[0])
        for component in folder.components:
            folder.config(component)
            folder.weight_files(component)
        return folder

    @property
    def kind(self) -> ModelKind:
        """Which encoders it holds."""
        return "msdm" if self.edit_version is None else "qwen"

    @property
    def version(self) -> Version:
        """Of Qwen-Image-Edit.

        Raises:
            ModelError: If this is another model.
        """
        if self.edit_version is None:
            raise self._is_other("qwen")
        return self.edit_version

    @property
    def title(self) -> str:
        """What the model is called."""
        return NAMES[self.kind] if self.edit_version is None else f"{NAMES[self.kind]} {self.edit_version}"

    @property
    def components(self) -> Mapping[str, str]:
        """Those that a complete folder has the weights of, and the stem of their files."""
        return WEIGHT_FILES if self.kind == "qwen" else MSDM_WEIGHT_FILES

    def config(self, component: str) -> dict[str, Any]:
        """The config.json of a component, such as "transformer", "vae" or "text_encoder"."""
        return _json(self.path, f"{component}/config.json", self._advice)

    def noise_schedule(self) -> dict[str, Any]:
        """The scheduler config: constants of the noise levels."""
        return _json(self.path, "scheduler/scheduler_config.json", self._advice)

    def weight_files(self, component: str) -> dict[str, Path]:
        """Tensor name -> safetensors file that holds it.

        Raises:
            ModelError: If a file is missing or truncated, or does not hold what the index says.
        """
        folder, stem = self.path / component, self.components.get(component, "diffusion_pytorch_model")
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if single.is_file() or not index.is_file():
            return dict.fromkeys(self._tensor_names(single), single)
        places = _json(self.path, str(index.relative_to(self.path)), self._advice).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ModelError(f"{index}: its weight_map does not say which file holds which tensor", self._advice)
        held = {file: self._tensor_names(folder / file) for file in sorted(set(places.values()))}
        for name, file in places.items():
            if name not in held[file]:
                raise ModelError(f"{folder / file}: does not hold {name}, as the index says", self._advice)
        return {name: folder / file for name, file in places.items()}

    def encoder_identity(self) -> dict[str, Any]:
        """All that decides embeddings and latents: both encoders, how they are called, and what goes before them."""
        tokenizer = _digest(f for f in (self.path / "tokenizer").iterdir() if f.suffix in (".json", ".txt"))
        identity: dict[str, Any] = {"tokenizer": tokenizer} | (
            self._qwen_identity() if self.kind == "qwen" else {"kind": self.kind, "call_version": MSDM_CALL_VERSION}
        )
        for component in ("vae", "text_encoder"):
            identity[f"{component}_config"] = digest_of(self.config(component))
            identity[f"{component}_weights"] = _digest(self.weight_files(component).values())
        return identity

    def _qwen_identity(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "template": template_digest(self.version),
            "num_dropped_tokens": NUM_DROPPED_TOKENS,
            "condition_edge_px": CONDITION_EDGE_PX[self.version],
            "processor": _digest((self.path / "processor").glob("*processor_config.json")),
        }

    def transformer_digest(self) -> str:
        """Identity of the MMDiT: its config and its weights."""
        return digest_of([self.config("transformer"), _digest(self.weight_files("transformer").values())])

    def _tensor_names(self, file: Path) -> set[str]:
        """Names of the tensors in a safetensors file, after a check that all their bytes are there."""
        if not file.is_file():
            raise self._missing(str(file.relative_to(self.path)))
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            try:
                header = json.loads(stream.read(length)) if 0 < length < MAX_HEADER_BYTES else None
            except ValueError:
                header = None
        if not isinstance(header, dict) or not header.keys() - {"__metadata__"}:
            raise ModelError(f"{file}: is not a complete safetensors file", self._advice)
        header.pop("__metadata__", None)
        expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if (size := file.stat().st_size) != expected:
            raise ModelError(f"{file}: the download is not complete ({size} of {expected} bytes)", self._advice)
        return set(header)

    @property
    def _advice(self) -> str:
        return MSDM_ADVICE if self.edit_version is None else _advice(self.path, self.edit_version)

    def _missing(self, name: str) -> ModelError:
        return ModelError(f"{self.path}: {name} is missing", self._advice)

    def _is_other(self, wanted: ModelKind) -> ModelError:
        advice = MSDM_ADVICE if wanted == "msdm" else "set data.model to a folder of Qwen-Image-Edit"
        return ModelError(f"{self.path}: is a model of {self.title}, expected one of {NAMES[wanted]}", advice)


def content_digest(file: Path) -> str:
    """Identity of a weight file.

    Up to 256 MiB the SHA-256 of the whole content. Of a larger file that of its size and of 64 MiB of it: the
    first, which holds the names and shapes, and 63 more, evenly spread. Any retrained model differs there; a
    change of a few bytes elsewhere, such as one that is made on purpose to go unnoticed, would not be seen.
    """
    size = file.stat().st_size
    if size <= MAX_WHOLE_FILE_BYTES:
        return sha256_of_file(file)
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for index in range(NUM_SAMPLES):
            stream.seek(index * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _digest(files: Iterable[Path]) -> str:
    return digest_of({file.name: content_digest(file) for file in sorted(set(files))})


def _version(path: Path) -> Version | None:
    """Of Qwen-Image-Edit; None for an MSDM."""
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such folder", _advice(path))
    name = _json(path, "model_index.json", _advice(path)).get("_class_name")
    if name in MSDM_PIPELINES:
        return None
    if name == "QwenImageEditPipeline":
        return "v1"
    if name == "QwenImageEditPlusPipeline":
        return "2511" if _json(path, "transformer/config.json", _advice(path)).get("zero_cond_t") else "2509"
    raise ModelError(
        f"{path}/model_index.json: {name} is a pipeline of neither Qwen-Image-Edit nor MSDM", _advice(path)
    )


def _json(path: Path, name: str, advice: str) -> dict[str, Any]:
    try:
        value = json.loads((path / name).read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: {name} is missing", advice) from None
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise
        raise ModelError(f"{path / name}: cannot be read ({error})", advice) from None
    if not isinstance(value, dict):
        raise ModelError(f"{path / name}: holds no JSON object", advice)
    return value


def _advice(path: Path, version: Version = "2509") -> str:
    return (
        f"on a machine with internet run `hf download {REPOSITORIES[version]} --local-dir {path.name}` and copy "
        f"it to {path}, or make a small one: `ccmdist model make --size tiny --fitted --out {path}`"
    )
