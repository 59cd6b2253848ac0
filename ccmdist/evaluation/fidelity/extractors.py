"""What sees images as features: fixed filters, or a network whose weights lie on this machine.

Nothing is downloaded and no code comes with weights. Names and hashes are known without torch, which is imported when
the first image is seen.

B: images of a batch. H, W: their size. D: features of an image.
"""

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ccmdist.ccm.skeleton import Floats
from ccmdist.commit import digest_of, sha256_of_file
from ccmdist.config.evaluate import ExtractorSettings
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.appearance import EXTRACTOR, EXTRACTOR_SHA256, NUM_FEATURES, features
from ccmdist.evaluation.fidelity.distances import INCEPTION

if TYPE_CHECKING:
    from ccmdist.evaluation.fidelity.networks import Inception as InceptionNetwork
    from ccmdist.evaluation.fidelity.networks import VisionTransformer

Images = NDArray[np.uint8]
"""(B, H, W), 8-bit grey."""
EXTRACTORS_VERSION: Final = 1
"""Raised whenever an image is given to a network in another way."""
FIDELITY_EXTRA: Final = 'install the extra: pip install "ccmdist[fidelity]", where torchvision exists for this torch'
INCEPTION_URL: Final = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
INCEPTION_SHA256_START: Final = "6726825d"
"""As the published file's name says."""
HUB: Final = "https://huggingface.co/"


@runtime_checkable
class FeatureExtractor(Protocol):
    """Turns images into features."""

    @property
    def name(self) -> str:
        """Told beside every distance."""
        ...

    @property
    def sha256(self) -> str:
        """Of the weights, and of how images are given to them."""
        ...

    @property
    def dim(self) -> int:
        """Features of an image."""
        ...

    @property
    def in_units_of_spread(self) -> bool:
        """Whether features are divided by their spread over the real images, so that none drowns the others."""
        ...

    @property
    def is_of_clip(self) -> bool:
        """Whether the CMMD is defined on them."""
        ...

    def features(self, images_BHW: Images) -> Floats:
        """(B, D); of one image the same to rounding, whatever else is in the batch."""
        ...


@runtime_checkable
class PatchExtractor(FeatureExtractor, Protocol):
    """An extractor that also sees parts of images."""

    def perceptual_distance(self, first_BHW: Images, second_BHW: Images) -> Floats:
        """(B,); 0 for equal images, 4 at most."""
        ...


@dataclass(frozen=True)
class WeightFree:
    """A bank of Laplacian-of-Gaussian filters."""

    name: str = EXTRACTOR
    sha256: str = EXTRACTOR_SHA256
    dim: int = NUM_FEATURES
    in_units_of_spread: bool = True
    is_of_clip: bool = False

    def features(self, images_BHW: Images) -> Floats:
        """(B, D), see :func:`ccmdist.evaluation.fidelity.appearance.features`."""
        return np.stack([features(image) for image in images_BHW])


@dataclass(frozen=True)
class Inception:
    """Pool features of the Inception that FIDs are taken on, through torch-fidelity.

    Attributes:
        weights: Its weights file.
    """

    weights: Path
    dim: int = 2048
    in_units_of_spread: bool = False
    is_of_clip: bool = False

    def __post_init__(self) -> None:
        if not self.weights.is_file():
            raise EvaluationError(
                f"extractors.inception: there is no weights file {self.weights}",
                f"place there what is published at {INCEPTION_URL}, or leave the setting out",
            )

    @property
    def name(self) -> str:
        """An FID is taken on the published weights alone, so other ones have another name."""
        return INCEPTION if self._weights_sha256.startswith(INCEPTION_SHA256_START) else "inception-v3-other-weights"

    @property
    def sha256(self) -> str:
        """See :class:`FeatureExtractor`."""
        return digest_of([EXTRACTORS_VERSION, "torch-fidelity 0.4, pool 2048", self._weights_sha256])

    @property
    def _weights_sha256(self) -> str:
        return _sha256(self.weights, self.weights.stat().st_mtime_ns)

    def features(self, images_BHW: Images) -> Floats:
        """(B, 2048)."""
        return self._network.features(images_BHW)

    @cached_property
    def _network(self) -> "InceptionNetwork":
        from ccmdist.evaluation.fidelity.networks import Inception as InceptionNetwork

        return InceptionNetwork(self.weights)


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes the input of a network: the whole frame is scaled to a square.

    The centre is never cut out, as the published preprocessing of DINOv2 does, because nerves at the border count.
    """

    size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = 3
    """In PIL's numbers; 3 is bicubic."""
    rescale: float = 1 / 255


@dataclass(frozen=True)
class Architecture:
    """A kind of vision transformer, and how images are given to it where its folder does not say."""

    name: str
    setting: str
    model_types: tuple[str, ...]
    published: str
    dim_field: str
    """Field of config.json with the number of features."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    size_px: int


DINOV2: Final = Architecture(
    name="dinov2-class-token",
    setting="dinov2",
    model_types=("dinov2",),
    published="facebook/dinov2-large",
    dim_field="hidden_size",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    size_px=224,
)
CLIP: Final = Architecture(
    name="clip-image-embedding",
    setting="clip",
    model_types=("clip", "clip_vision_model"),
    published="openai/clip-vit-large-patch14-336",
    dim_field="projection_dim",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    size_px=224,
)


@dataclass(frozen=True)
class Transformer:
    """A DINOv2 or the image side of a CLIP, in a folder in the layout of transformers.

    Attributes:
        architecture: Which of them.
        folder: Holds config.json and safetensors; preprocessor_config.json is read if it is there.
    """

    architecture: Architecture
    folder: Path
    in_units_of_spread: bool = False

    def __post_init__(self) -> None:
        missing = [name for name in ("config.json", "*.safetensors") if not any(self.folder.glob(name))]
        if missing:
            place = "config.json and model.safetensors"
            raise EvaluationError(
                f"{self._setting}: {self.folder} holds no {' and no '.join(missing)}",
                f"place there {place} of a model such as {HUB}{self.architecture.published}; one that has "
                "pytorch_model.bin alone is converted by save_pretrained of transformers",
            )
        if (kind := self.config.get("model_type")) not in self.architecture.model_types:
            expected = " or ".join(self.architecture.model_types)
            raise EvaluationError(
                f"{self._setting}: {self.folder / 'config.json'} has model_type {kind!r}, expected {expected}",
                f"name a folder such as that of {HUB}{self.architecture.published}",
            )
        if not isinstance(self.config.get(self.architecture.dim_field), int):
            raise EvaluationError(
                f"{self._setting}: {self.folder / 'config.json'} has no number {self.architecture.dim_field}",
                "copy it again",
            )

    @property
    def is_of_clip(self) -> bool:
        """See :class:`FeatureExtractor`."""
        return self.architecture is CLIP

    @property
    def _setting(self) -> str:
        return f"extractors.{self.architecture.setting}"

    @cached_property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return _json(self.folder / "config.json", self._setting)

    @property
    def name(self) -> str:
        """See :class:`FeatureExtractor`."""
        return f"{self.architecture.name}-{self.dim}"

    @property
    def sha256(self) -> str:
        """See :class:`FeatureExtractor`."""
        files = sorted(self.folder.glob("*.safetensors"))
        weights = [_sha256(file, file.stat().st_mtime_ns) for file in files]
        given = self.preprocessing
        told = [given.size_px, given.mean, given.std, given.resample, given.rescale]
        return digest_of([EXTRACTORS_VERSION, self.architecture.name, weights, self.config, told])

    @property
    def dim(self) -> int:
        """See :class:`FeatureExtractor`."""
        return int(self.config[self.architecture.dim_field])

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """Off preprocessor_config.json, and what the architecture usually has where that is silent or absent."""
        file = self.folder / "preprocessor_config.json"
        told = _json(file, self._setting) if file.is_file() else {}
        usual = self.architecture
        size: Any = told.get("crop_size") or told.get("size") or self._image_size_px
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or self._image_size_px
        return Preprocessing(
            size_px=int(size),
            mean=tuple(told.get("image_mean", usual.mean)),
            std=tuple(told.get("image_std", usual.std)),
            resample=told.get("resample", 3),
            rescale=told.get("rescale_factor", 1 / 255),
        )

    @property
    def _image_size_px(self) -> int:
        """What the network was made for, but no more than distances on its kind are usually taken at."""
        vision = self.config.get("vision_config", self.config)
        return min(self.architecture.size_px, vision.get("image_size", self.architecture.size_px))

    def features(self, images_BHW: Images) -> Floats:
        """(B, D): DINOv2's class token after the last norm, CLIP's projected embedding."""
        return self._network.features(images_BHW)

    def perceptual_distance(self, first_BHW: Images, second_BHW: Images) -> Floats:
        """See :class:`PatchExtractor`."""
        return self._network.perceptual_distance(first_BHW, second_BHW)

    @cached_property
    def _network(self) -> "VisionTransformer":
        from ccmdist.evaluation.fidelity.networks import VisionTransformer

        return VisionTransformer(self._setting, self.folder, self.dim, self.preprocessing)


def _json(file: Path, setting: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{setting}: {file} is no JSON: {error}", "copy it again") from error
    if not isinstance(found, dict):
        raise EvaluationError(f"{setting}: {file} is no JSON object", "copy it again")
    return found


@lru_cache
def _sha256(file: Path, _modified_ns: int) -> str:
    """Once per process: weights are large."""
    return sha256_of_file(file)


def chosen(settings: ExtractorSettings) -> list[FeatureExtractor]:
    """The extractors that the settings name; reads no weights.

    Raises:
        EvaluationError: If weights are not where the settings say, or the packages that read them are not installed.
    """
    found: list[FeatureExtractor] = [WeightFree()] if settings.weight_free else []
    if settings.inception:
        found.append(Inception(settings.inception))
        if missing := [name for name in ("torch_fidelity", "torchvision") if find_spec(name) is None]:
            raise EvaluationError(f"extractors.inception: {missing[0]} is not installed here", FIDELITY_EXTRA)
    if settings.dinov2:
        found.append(Transformer(DINOV2, settings.dinov2))
    if settings.clip:
        found.append(Transformer(CLIP, settings.clip))
    return found
