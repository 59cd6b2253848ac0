"""The networks behind the extractors: local weights, safetensors or a pickle that may hold tensors alone.

B: images of a batch. H, W: their size. S: side of a network's input. D: features. P: patches.
"""

import io
import pickle
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ccmdist.ccm.skeleton import Floats
from ccmdist.cluster.device import current_device
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.extractors import FIDELITY_EXTRA, Preprocessing

NUM_LAYERS: Final = 4
"""Layers whose patches make the perceptual distance, evenly over the depth of the network."""


class Inception:
    """torch-fidelity's Inception; torch-fidelity cannot be imported without torchvision."""

    def __init__(self, weights: Path) -> None:
        """Load the weights.

        Raises:
            EvaluationError: If torch-fidelity cannot be imported, or the file holds something else.
        """
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise EvaluationError(
                f"extractors.inception: torch-fidelity cannot be imported here ({error})",
                FIDELITY_EXTRA,
            ) from error
        # torch-fidelity unpickles whatever it is given, so it is given only what was read as tensors and no more.
        held = io.BytesIO()
        torch.save(tensors_of_pickle(weights), held)
        held.seek(0)
        try:
            network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=held)
        except RuntimeError as error:
            raise _not_inception(weights, error) from error
        self._device = current_device()
        self._network = network.to(self._device)

    @torch.inference_mode()
    def features(self, images_BHW: NDArray[np.uint8]) -> Floats:
        """(B, 2048); the network scales the images itself, to 299 px as TensorFlow 1 did."""
        images = torch.from_numpy(np.ascontiguousarray(images_BHW))[:, None].expand(-1, 3, -1, -1)
        (found,) = self._network(images.to(self._device))
        return np.asarray(found.float().cpu().numpy())


def tensors_of_pickle(weights: Path) -> dict[str, Tensor]:
    """What a file of torch.save holds, if that is named tensors and nothing else; no code of it runs.

    Raises:
        EvaluationError: If it holds anything else.
    """
    try:
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise _not_inception(weights, error) from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise _not_inception(weights, "it holds other things than tensors")
    return found


def _not_inception(weights: Path, why: object) -> EvaluationError:
    return EvaluationError(
        f"extractors.inception: {weights} does not hold the weights of torch-fidelity's Inception",
        f"copy the published file again ({str(why).splitlines()[0]})",
    )


class VisionTransformer:
    """A DINOv2, or the image side of a CLIP."""

    def __init__(self, setting: str, folder: Path, dim: int, preprocessing: Preprocessing) -> None:
        """Load the weights.

        Raises:
            EvaluationError: If weights do not fit the config. Those that are missing transformers would draw at random.
        """
        self._preprocessing, self._is_clip = preprocessing, setting.endswith("clip")
        self._device = current_device()
        model, loading = _loaded(folder, dim, self._is_clip)
        for problem in ("missing_keys", "mismatched_keys"):
            if loading[problem]:
                raise EvaluationError(
                    f"{setting}: {folder}: {problem.replace('_keys', '')} weights, such as "
                    f"{min(map(str, loading[problem]))}",
                    "use config.json and weights of the same model",
                )
        self._model = model.to(self._device).eval()

    @torch.inference_mode()
    def features(self, images_BHW: NDArray[np.uint8]) -> Floats:
        """(B, D)."""
        found = self._model(pixel_values=self._inputs(images_BHW))
        embeddings = found.image_embeds if self._is_clip else found.pooler_output
        return np.asarray(embeddings.cpu().numpy())

    @torch.inference_mode()
    def perceptual_distance(self, first_BHW: NDArray[np.uint8], second_BHW: NDArray[np.uint8]) -> Floats:
        """(B,); squared distance of patch features of unit length, mean over patches and layers.

        In the manner of LPIPS, but without its weights that were fitted to what people see: an uncalibrated measure of
        ours, which compares with no published LPIPS.

        Source:
            Zhang et al., CVPR 2018 (arXiv:1801.03924), Eq. 1 with all channel weights 1.
        """
        layers = zip(self._patches(first_BHW), self._patches(second_BHW), strict=True)
        distances = [((first - second) ** 2).sum(dim=-1).mean(dim=-1) for first, second in layers]
        return np.asarray(torch.stack(distances).mean(dim=0).cpu().numpy())

    def _patches(self, images_BHW: NDArray[np.uint8]) -> list[Tensor]:
        """(B, P, D) of each layer, unit length over D, in the order of depth."""
        states = self._model(pixel_values=self._inputs(images_BHW), output_hidden_states=True).hidden_states
        depth = len(states) - 1
        chosen = sorted({max(1, round(depth * (place + 1) / NUM_LAYERS)) for place in range(NUM_LAYERS)})
        # The class token comes first and is no patch.
        return [torch.nn.functional.normalize(states[layer][:, 1:], dim=-1) for layer in chosen]

    def _inputs(self, images_BHW: NDArray[np.uint8]) -> Tensor:
        """(B, 3, S, S)."""
        given = self._preprocessing
        size, how = (given.size_px, given.size_px), Image.Resampling(given.resample)
        scaled = np.stack([np.asarray(Image.fromarray(image).resize(size, how)) for image in images_BHW])
        grey = torch.from_numpy(scaled).to(self._device, torch.float32)[:, None] * given.rescale
        mean, std = (torch.tensor(values, device=self._device)[:, None, None] for values in (given.mean, given.std))
        return (grey - mean) / std


def _loaded(folder: Path, dim: int, is_clip: bool) -> tuple[Any, dict[str, Any]]:
    """The network in fp32, and what transformers says of its weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()
    kind, described = (CLIPVisionModelWithProjection, CLIPVisionConfig) if is_clip else (Dinov2Model, Dinov2Config)
    config = described.from_pretrained(str(folder), local_files_only=True)
    if is_clip:
        # The image side alone does not always repeat what the whole model says.
        config.projection_dim = dim
    verbosity = logging.get_verbosity()
    # The side of texts of a whole CLIP is left out, which transformers would list weight by weight.
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(
            str(folder),
            config=config,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    finally:
        logging.set_verbosity(verbosity)
