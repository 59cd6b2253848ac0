"""The networks of the downstream tasks: MONAI's and transformers' with random weights, and MDF-MLLM."""

from collections.abc import Callable
from itertools import pairwise
from typing import Final

import torch
from monai.losses import DiceCELoss
from monai.networks.blocks import Convolution
from monai.networks.nets import UNet, resnet18, resnet50
from torch import Tensor, nn
from torch.nn import functional

from ccmdist.ccm.diagnosis_prompts import diagnosis_prompt
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.evaluate import NetworkSettings, Task

NUM_CLASSES: Final = len(CLINICAL_GROUPS)
SMALL_CHANNELS: Final = (16, 32, 32)
SWIN: Final = {"embed_dim": 48, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "patch_size": 2, "window_size": 4}
"""Half as wide as Swin-T, and with small patches and windows, for images of 64 to 384 px."""
SMOOTH_DICE: Final = 1e-5
SD_SHOWN: Final = 3.0
"""MDF-MLLM is shown pixels in [-1, 1]: what lies within so many SD of the mean."""


def built(task: Task, settings: NetworkSettings) -> nn.Module:
    """A network that maps images (N, 1, H, W) to logits: (N, 3) of a diagnosis, (N, 1, H, W) of a segmentation."""
    if task == "segmentation":
        strides = (2,) * (len(settings.unet_channels) - 1)
        return UNet(2, 1, 1, settings.unet_channels, strides, num_res_units=1)
    build: dict[str, Callable[[], nn.Module]] = {
        "small": _small,
        "resnet18": lambda: resnet18(spatial_dims=2, n_input_channels=1, num_classes=NUM_CLASSES, conv1_t_stride=2),
        "resnet50": lambda: resnet50(spatial_dims=2, n_input_channels=1, num_classes=NUM_CLASSES, conv1_t_stride=2),
        "swin": lambda: _Swin(settings.size_px),
        "mdf_mllm": lambda: _Mdf(settings),
    }
    return build[settings.diagnosis]()


def losses(task: Task) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits and targets -> the mean loss: cross-entropy of a diagnosis, Dice plus cross-entropy of a segmentation."""
    if task == "diagnosis":
        return functional.cross_entropy
    loss: Callable[[Tensor, Tensor], Tensor] = DiceCELoss(sigmoid=True, smooth_nr=SMOOTH_DICE, smooth_dr=SMOOTH_DICE)
    return loss


def _small() -> nn.Module:
    """Three convolutions with stride 2, the mean over the image, and a linear head."""
    channels = (1, *SMALL_CHANNELS)
    blocks = [
        Convolution(2, before, after, strides=2, kernel_size=3, norm="batch", act="relu")
        for before, after in pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], NUM_CLASSES))


class _Swin(nn.Module):
    """Swin of transformers, which answers with more than logits."""

    def __init__(self, size_px: int) -> None:
        super().__init__()
        from transformers import SwinConfig, SwinForImageClassification

        self.swin = SwinForImageClassification(
            SwinConfig(image_size=size_px, num_channels=1, num_labels=NUM_CLASSES, drop_path_rate=0.0, **SWIN)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 3)."""
        logits: Tensor = self.swin(pixel_values=images).logits
        return logits


class _Mdf(nn.Module):
    """MDF-MLLM, or a bare language model, which is asked the same of every frame."""

    def __init__(self, settings: NetworkSettings) -> None:
        super().__init__()
        assert settings.mdf is not None, "the settings were checked"
        from ccmdist.models.mllm import Prompts
        from ccmdist.train.mdf_network import make_mdf_mllm, refuse_too_large

        chosen, text = settings.mdf.model_copy(update={"mask_weight": 0.0}), diagnosis_prompt({})
        refuse_too_large(chosen, num_ranks=1)
        self.mdf = make_mdf_mllm(chosen, settings.size_px, torch.initial_seed())
        self._asked = Prompts(chosen.mllm, [text], settings.size_px).of(text)
        self.attended: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 3)."""
        if self.mdf.adapter is not None:
            self.mdf.adapter.advance()  # weights may have changed, by a step or by loading
        ids, last = (self._asked[name].to(images.device) for name in ("prompt_ids", "prompt_last"))
        pixels = (images / SD_SHOWN).clamp(-1, 1)
        logits: Tensor
        logits, _, self.attended = self.mdf(pixels, ids.expand(len(images), -1), last.expand(len(images)))
        return logits


def attended_by(network: nn.Module) -> dict[str, Tensor]:
    """By level, how much MDF-MLLM attended to its tokens, (N, tokens), in its last forward; of others nothing."""
    return network.attended if isinstance(network, _Mdf) else {}


def as_input(images: Tensor) -> Tensor:
    """Grey images, uint8 (N, H, W), as what the networks see: (N, 1, H, W), each with mean 0 and SD 1.

    Brightness and contrast of a frame depend on the device and the operator more than on its subject.
    """
    x = images[:, None].float()
    return (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True).clamp_min(1e-3)


def parameter_count(network: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """A copy of all but frozen weights: what :func:`built` does not make again."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: value.clone() for name, value in network.state_dict().items() if name not in frozen}


def target_of(task: Task, masks: Tensor, labels: Tensor) -> Tensor:
    """What logits are compared with: the labels (N,), or the masks as (N, 1, H, W)."""
    return labels if task == "diagnosis" else masks[:, None].float()


def probabilities(task: Task, logits: Tensor) -> Tensor:
    """Of the classes, or of each pixel to be nerve."""
    return torch.softmax(logits, 1) if task == "diagnosis" else torch.sigmoid(logits)
