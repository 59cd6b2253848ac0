"""The backbone of a model folder: the one table. What a kind needs is imported when it is chosen."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from ccmdist.config.objectives.objective import ModelKind
from ccmdist.models.backbones.backbone import Backbone
from ccmdist.models.model_folder import ModelFolder

Probe = Callable[[Any, torch.Generator], Tensor]


def backbone_of(folder: ModelFolder) -> Backbone:
    """The backbone of a folder.

    Raises:
        ModelError: If it holds no model that an adapter can be trained on.
    """
    if folder.kind not in BACKBONES:
        raise folder.is_other(*BACKBONES)
    return BACKBONES[folder.kind](folder)


def _qwen(folder: ModelFolder) -> Backbone:
    from ccmdist.models.backbones.qwen import Qwen

    return Qwen(folder)


def _flux(folder: ModelFolder) -> Backbone:
    from ccmdist.models.backbones.flux import FluxKontext

    return FluxKontext(folder)


def _flux_control(folder: ModelFolder) -> Backbone:
    from ccmdist.models.backbones.flux import FluxControl

    return FluxControl(folder)


def _kandinsky(folder: ModelFolder) -> Backbone:
    from ccmdist.models.backbones.kandinsky import Kandinsky

    return Kandinsky(folder)


@torch.no_grad()
def probe(model: nn.Module) -> Tensor:
    """What a transformer of a known class, in fp32, predicts on inputs that are always the same."""
    return PROBES[type(model).__name__]()(model, torch.Generator().manual_seed(0))


def _qwen_probe() -> Probe:
    from ccmdist.models.backbones.qwen import predicted

    return predicted


def _flux_probe() -> Probe:
    from ccmdist.models.backbones.flux import predicted

    return predicted


def _kandinsky_probe() -> Probe:
    from ccmdist.models.backbones.kandinsky import predicted

    return predicted


PROBES: Final[dict[str, Callable[[], Probe]]] = {
    "QwenImageTransformer2DModel": _qwen_probe,
    "FluxTransformer2DModel": _flux_probe,
    "Kandinsky5Transformer3DModel": _kandinsky_probe,
}
BACKBONES: Final[dict[ModelKind, Callable[[ModelFolder], Backbone]]] = {
    "qwen": _qwen,
    "flux": _flux,
    "flux_control": _flux_control,
    "kandinsky5": _kandinsky,
}
