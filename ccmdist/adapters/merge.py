"""An adapter merged into the weights of its base: the adapted model without anything beside it."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ccmdist.adapters.state import AdapterState
from ccmdist.adapters.wdlora import ROWS_AT_ONCE, root


@torch.no_grad()
def merge_into(model: nn.Module, state: AdapterState) -> None:
    """Replace the weight of every adapted linear by W', computed in fp32 (fp64 for fp64 weights) and rounded once.

    Args:
        model: The base, whole in this process, on any device.
        state: What to merge.

    Raises:
        AdapterError: If a linear is missing or has another shape; nothing has been changed then.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    state.check_fits({name: linear.weight.shape for name, linear in linears.items()}, Path(type(model).__name__))
    for name, tensors in state.tensors.items():
        weight = linears[name].weight
        for rows in row_slices(len(weight)):
            weight[rows] = merged_rows(weight[rows], tensors, rows, state.scale)


def merged_rows(W: Tensor, tensors: Mapping[str, Tensor], rows: slice, scale: float) -> Tensor:
    """Some rows of W', in the dtype of ``W``.

    Args:
        W: These rows of the base's weight.
        tensors: "lora_A", "lora_B" and, for WDLoRA, "magnitude" of the whole linear.
        rows: Which rows ``W`` are.
        scale: s.
    """
    place = {"device": W.device, "dtype": torch.promote_types(W.dtype, torch.float32)}
    A, B = tensors["lora_A"].to(**place), tensors["lora_B"][rows].to(**place)
    adapted = W.to(**place) + scale * (B @ A)
    if (magnitude := tensors.get("magnitude")) is not None:
        adapted *= (magnitude[rows].to(**place) / root(adapted.square().sum(1)))[:, None]
    return adapted.to(W.dtype)


def row_slices(num_rows: int) -> Iterator[slice]:
    """All rows, some at a time, so that no second copy of a weight is needed."""
    for first in range(0, num_rows, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, num_rows))
