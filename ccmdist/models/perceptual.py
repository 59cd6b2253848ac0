"""LPIPS between pictures, differentiable: VGG16's convolutions from a local file, and LPIPS's own weights of channels.

The convolutions are read from a file that the user names, as torchvision publishes them; the weights of channels, five
small tensors, come with torchmetrics. torchvision itself is not needed.

Source: Zhang et al., CVPR 2018 (arXiv:1801.03924), Eq. 1; version 0.1 of the authors' package.

Shape suffixes: B samples, C channels, H W rows and columns.
"""

import pickle
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F
import torchmetrics.functional.image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ccmdist.errors import ModelError

BLOCKS: Final = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Output channels of VGG16's convolutions; before each block but the first, edges are halved."""
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and deviation of colours in [-1, 1]: LPIPS's `ScalingLayer`."""
SMALLEST_PX: Final = 16
REMEDY: Final = (
    "set objective.perceptual_weights to a file with torchvision's VGG16 (vgg16-397923af.pth, or the same as "
    "safetensors), or to null for none"
)


class Perceptual(nn.Module):
    """LPIPS with VGG16; never trained, always fp32."""

    def __init__(self, weights: Path) -> None:
        """Read the weights.

        Raises:
            ModelError: If the file does not hold the convolutions of VGG16.
        """
        super().__init__()
        held = _tensors(weights)
        self.convolutions = nn.ModuleList()
        place, before = 0, 3
        for block in BLOCKS:
            for channels in block:
                convolution = nn.Conv2d(before, channels, 3, padding=1)
                convolution.load_state_dict(_named(held, f"features.{place}", convolution, weights))
                self.convolutions.append(convolution)
                place, before = place + 2, channels  # each is followed by a ReLU
            place += 1  # and each block by the halving
        heads = Path(torchmetrics.functional.image.__file__).parent / "lpips_models" / "vgg.pth"
        # Saved on a GPU, and read anywhere.
        found = torch.load(heads, weights_only=True, map_location="cpu")
        for index in range(len(BLOCKS)):
            self.register_buffer(f"head_{index}", found[f"lin{index}.model.1.weight"])
        self.register_buffer("shift", torch.tensor(SHIFT).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(1, 3, 1, 1))
        self.float().eval().requires_grad_(False)

    def forward(self, first_B3HW: Tensor, second_B3HW: Tensor) -> Tensor:
        """Distance of each pair, (B,); pictures in [-1, 1], from 16 px on."""
        distance_B = first_B3HW.new_zeros(len(first_B3HW))
        pairs = zip(self._features(first_B3HW), self._features(second_B3HW), strict=True)
        for index, (first_BCHW, second_BCHW) in enumerate(pairs):
            squares_BCHW = (_of_unit_length(first_BCHW) - _of_unit_length(second_BCHW)).square()
            distance_B = distance_B + F.conv2d(squares_BCHW, self.get_buffer(f"head_{index}")).mean(dim=(1, 2, 3))
        return distance_B

    def _features(self, pictures_B3HW: Tensor) -> list[Tensor]:
        """(B, C, H, W) after each block."""
        x_BCHW, found, convolutions = (pictures_B3HW - self.shift) / self.scale, [], iter(self.convolutions)
        for index, block in enumerate(BLOCKS):
            if index:
                x_BCHW = F.max_pool2d(x_BCHW, 2)
            for _ in block:
                x_BCHW = F.relu(next(convolutions)(x_BCHW))
            found.append(x_BCHW)
        return found


def _of_unit_length(features_BCHW: Tensor) -> Tensor:
    # As in the authors' package, but for the place of the small number: theirs gives a gradient of NaN at zeros.
    return features_BCHW * (features_BCHW.square().sum(dim=1, keepdim=True) + 1e-20).rsqrt()


def _tensors(weights: Path) -> dict[str, Tensor]:
    """Named tensors of a file of safetensors or of torch.save; no code of it runs."""
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        found = torch.load(weights, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        problem = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{weights}: cannot be read as weights ({problem})", REMEDY) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ModelError(f"{weights}: holds other things than named tensors", REMEDY)
    return found


def _named(held: dict[str, Tensor], name: str, module: nn.Module, weights: Path) -> dict[str, Tensor]:
    wanted = {part: f"{name}.{part}" for part, _ in module.named_parameters()}
    for part, parameter in module.named_parameters():
        found = held.get(wanted[part])
        if found is None or found.shape != parameter.shape:
            shape = "missing" if found is None else f"of shape {tuple(found.shape)}"
            raise ModelError(
                f"{weights}: is not VGG16: {wanted[part]} is {shape}, expected {tuple(parameter.shape)}", REMEDY
            )
    return {part: held[full] for part, full in wanted.items()}
