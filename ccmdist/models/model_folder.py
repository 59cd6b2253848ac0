"""A model in diffusers layout, of any kind that is known: is it complete, which is it, what identifies it.

Imports no torch. Kind and version are read off the folder itself, never off a flag, and what `model make` writes is
treated like a download.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ccmdist.commit import digest_of, sha256_of_file
from ccmdist.config.objectives.objective import ModelKind
from ccmdist.errors import OF_THE_MACHINE, ModelError
from ccmdist.models.layout import (
    LAYOUTS,
    MSDM_WEIGHT_FILES,
    QWEN,
    WEIGHT_FILES,
    FolderLayout,
    advice_for,
    kinds_named,
    layout_named,
)
from ccmdist.models.sizes import PIPELINES
from ccmdist.models.template import CONDITION_EDGE_PX, NUM_DROPPED_TOKENS, Version, template_digest

__all__ = ["MSDM_WEIGHT_FILES", "WEIGHT_FILES", "ModelFolder", "content_digest"]

MAX_WHOLE_FILE_BYTES: Final = 256 << 20
SAMPLE_BYTES, NUM_SAMPLES = 1 << 20, 64
MAX_HEADER_BYTES: Final = 100 << 20


@dataclass(frozen=True)
class ModelFolder:
    """A complete model folder.

    Attributes:
        path: The folder.
        edit_version: Of Qwen-Image-Edit; None for models without versions.
        layout: What it holds.
    """

    path: Path
    edit_version: Version | None
    layout: FolderLayout = QWEN

    @classmethod
    def open(cls, path: Path, *kinds: ModelKind) -> "ModelFolder":
        """The model in ``path``, after a check that every file is there and has all its bytes.

        Args:
            path: The folder.
            kinds: Of models that will do; none if all do.

        Raises:
            ModelError: If a file is missing or cannot be read, or the model is of another kind.
        """
        folder = _opened(path, kinds)
        if kinds and folder.kind not in kinds:
            raise folder.is_other(*kinds)
        for choices in folder.layout.required:
            if not any((path / choice).is_file() for choice in choices):
                raise folder._missing(choices[0])
        for component in folder.components:
            folder.config(component)
            folder.weight_files(component)
        return folder

    @property
    def kind(self) -> ModelKind:
        """Which encoders it holds."""
        return self.layout.kind

    @property
    def version(self) -> Version:
        """Of Qwen-Image-Edit.

        Raises:
            ModelError: If this is another model.
        """
        if self.edit_version is None:
            raise self.is_other("qwen")
        return self.edit_version

    @property
    def pipeline(self) -> str:
        """The stock pipeline that draws with it, as its index names it."""
        return str(_json(self.path, "model_index.json", self._advice)["_class_name"])

    @property
    def title(self) -> str:
        """What the model is called."""
        return self.layout.name if self.edit_version is None else f"{self.layout.name} {self.edit_version}"

    @property
    def is_told_guidance(self) -> bool:
        """Whether its transformer is told a guidance itself, as one that was distilled is."""
        return bool(self.config("transformer").get("guidance_embeds", False))

    @property
    def repository(self) -> str:
        """Where a model like it is published; "" where that may be one of several."""
        return self.layout.published_as(self.path, self.edit_version)

    @property
    def components(self) -> Mapping[str, str]:
        """Those that a complete folder has the weights of, and the stem of their files."""
        return self.layout.weight_files

    def config(self, component: str) -> dict[str, Any]:
        """The config.json of a component, such as "transformer", "vae" or "text_encoder"."""
        return _json(self.path, f"{component}/config.json", self._advice)

    def noise_schedule(self) -> dict[str, Any]:
        """The scheduler config, constants of the noise levels, and how the pipeline asks the scheduler for them."""
        return _json(self.path, "scheduler/scheduler_config.json", self._advice) | dict(self.layout.schedule)

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
        """All that decides embeddings and latents: the encoders, how they are called, and what goes before them."""
        layout = self.layout
        identity: dict[str, Any] = {name: self._tokenizer_digest(name) for name in layout.tokenizers}
        if layout.versions:
            identity |= self._version_identity()
        else:
            identity |= {"kind": layout.kind, "call_version": layout.call_version}
            if layout.words:
                identity["template"] = digest_of(dict(layout.words))
        for component in layout.encoders:
            identity[f"{component}_config"] = digest_of(self.config(component))
            identity[f"{component}_weights"] = _digest(self.weight_files(component).values())
        return identity

    def _tokenizer_digest(self, name: str) -> str:
        return _digest(f for f in (self.path / name).iterdir() if f.suffix in (".json", ".txt", ".model"))

    def _version_identity(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "template": template_digest(self.version),
            "num_dropped_tokens": NUM_DROPPED_TOKENS,
            "condition_edge_px": CONDITION_EDGE_PX[self.version],
            "processor": _digest((self.path / "processor").glob("*processor_config.json")),
        }

    def transformer_digest(self) -> str:
        """Identity of the transformer: its config and its weights."""
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
        return advice_for(self.layout, self.path, self.edit_version)

    def _missing(self, name: str) -> ModelError:
        return ModelError(f"{self.path}: {name} is missing", self._advice)

    def is_other(self, *wanted: ModelKind) -> ModelError:
        """The error for a model of a kind that will not do."""
        layouts = [layout for layout in dict.fromkeys(LAYOUTS.values()) if layout.kind in wanted]
        names = kinds_named(wanted)
        advice = layouts[0].advice or f"set data.model to a folder of {names}"
        return ModelError(f"{self.path}: is a model of {self.title}, expected one of {names}", advice)


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


def _opened(path: Path, kinds: Sequence[ModelKind]) -> ModelFolder:
    """The folder, of which no more is known than its index says."""
    advice = advice_for(layout_named(path, kinds), path)
    if not path.is_dir():
        raise ModelError(f"{path}: there is no such folder", advice)
    name = _json(path, "model_index.json", advice).get("_class_name")
    if (layout := LAYOUTS.get(str(name))) is None:
        known = ", ".join(LAYOUTS)
        raise ModelError(f"{path}/model_index.json: {name} is none of the known pipelines, {known}", advice)
    return ModelFolder(path, _version(path, str(name)) if layout.versions else None, layout)


def _version(path: Path, name: str) -> Version:
    if name == PIPELINES["v1"]:
        return "v1"
    advice = advice_for(QWEN, path)
    return "2511" if _json(path, "transformer/config.json", advice).get("zero_cond_t") else "2509"


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
