"""MDF-MLLM put together: language model and U-Net of their folders, fusion, adapter; made anew, and read back."""

import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from ccmdist.adapters.injection import RowSquares, inject
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.mdf_base import base_digest, check_base
from ccmdist.models.mdf_mllm import Fusion, MdfMllm
from ccmdist.models.mllm import Mllm, mllm_without_weights, read_weights
from ccmdist.models.network_state import NetworkState, read_network
from ccmdist.models.unet import LevelUnet, make_unet
from ccmdist.train.llm_adapter import adapter_of

DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
BYTES_TRAINED: Final = 20
"""Of a parameter that is trained and cut over the ranks: its weight twice, its gradient, two moments, all fp32."""
MOST_TRAINED: Final = 3_000_000_000
"""Parameters of a rank's share of a language model that is trained as a whole: 60 GB."""


def make_mdf_mllm(
    settings: DiagnoseSettings, image_size_px: int, seed: int, zero_config: dict[str, Any] | None = None
) -> MdfMllm:
    """The model as training finds it: language model and U-Net of their folders, the rest dependent on the seed alone.

    Only what is trained requires gradients. On the CPU.

    Args:
        settings: Of the objective.
        image_size_px: Edge of the images.
        seed: Of what is new.
        zero_config: A DeepSpeed configuration: of the language model, each rank reads and keeps its share
            (collective). None: the whole model in this process.

    Raises:
        ModelError: If a folder cannot be used, or the parts do not fit.
    """
    check_base(settings)
    mllm, adapter = mllm_without_weights(settings.mllm), adapter_of(settings)
    _check_fit(settings, mllm)
    names = [] if adapter is None else mllm.linear_names()
    squares = RowSquares(names)
    read_weights(mllm, settings.mllm, DTYPES[settings.llm_dtype], zero_config, squares.on_rows)
    mllm.model.requires_grad_(settings.llm == "full")
    unet = _starting_unet(settings, seed) if settings.fusion_levels else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fusion = Fusion(settings, image_size_px, mllm.hidden_size)
    model = MdfMllm(settings, unet, mllm, fusion)
    if adapter is not None:
        row_squares = squares.whole() if zero_config is None else squares.reduce()
        model.adapter = inject(mllm.model, names, adapter, row_squares, seed)
    trained = {id(p) for parameters in model.parameter_sets().values() for p in parameters.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    return model


def _starting_unet(settings: DiagnoseSettings, seed: int) -> LevelUnet:
    """The U-Net that `segment` has left, or one with random weights.

    Raises:
        ModelError: If its weights cannot be read.
    """
    unet = make_unet(settings, seed)
    if settings.unet is not None:
        unet.load_state_dict(dict(read_network(settings.unet).tensors))
    return unet


def network_of(state: NetworkState, device: torch.device) -> MdfMllm:
    """The whole model of an exported network, ready to diagnose.

    Raises:
        ModelError: If its folders do not hold what it was trained with, or the weights do not fit.
    """
    settings, wanted = state.about.settings, state.about.facts.get("base_digest", "")
    if not isinstance(settings, DiagnoseSettings):
        raise ModelError(f"network: is one of {state.about.kind}", "name that of a run of objective.kind diagnose")
    if (found := base_digest(settings)) != wanted:
        raise ModelError(
            f"{settings.mllm}: with the U-Net it is {found[:12]}, and the network was trained with {wanted[:12]}",
            "put the language model and the U-Net that it was trained with where its settings name them",
        )
    model = make_mdf_mllm(settings, state.about.image_size_px, 0)
    load_trained(model, state.tensors)
    return model.requires_grad_(False).eval().to(device)


def load_trained(model: MdfMllm, tensors: Mapping[str, Tensor]) -> None:
    """Take over what was trained.

    Raises:
        ModelError: If it is not what such a model trains.
    """
    wanted = {name: p for parameters in model.parameter_sets().values() for name, p in parameters.items()}
    if bad := sorted(wanted.keys() ^ tensors.keys()):
        raise ModelError(
            f"network: parameter {bad[0]} is missing, or of another model", "use settings and weights of one run"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if parameter.shape != tensors[name].shape:
                raise ModelError(
                    f"network: {name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(parameter.shape)}",
                    "use the language model that it was trained with",
                )
            parameter.copy_(tensors[name])
    if model.adapter is not None:
        model.adapter.advance()


def _check_fit(settings: DiagnoseSettings, mllm: Mllm) -> None:
    width = mllm.hidden_size
    if width % settings.fusion_heads or width % 4:
        raise ModelError(
            f"objective.fusion_heads: {settings.fusion_heads} heads do not divide the {width} channels of "
            f"{settings.mllm}",
            "use a number of heads that does",
        )


def refuse_too_large(settings: DiagnoseSettings, num_ranks: int) -> None:
    """Refuse to train a language model as a whole whose share no rank can hold; its weights are not read.

    Raises:
        ConfigError: If it is too large.
        ModelError: If it is missing, gated or of another kind.
    """
    if settings.llm != "full":
        return
    num = sum(parameter.numel() for parameter in mllm_without_weights(settings.mllm).model.parameters())
    if num > MOST_TRAINED * num_ranks:
        raise ConfigError(
            f"objective.llm: full would train {num / 1e9:.1f} billion parameters on {num_ranks} rank(s), "
            f"{BYTES_TRAINED * num / num_ranks / 1e9:.0f} GB on each for weights, gradients and moments",
            f"use at least {math.ceil(num / MOST_TRAINED)} ranks, or set objective.llm=wdlora or lora",
        )
