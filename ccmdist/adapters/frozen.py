"""Products with weights that are not trained, in whatever form these are held.

A weight is a tensor, or a module that makes one when asked: its values may be held in 4 or 8 bits. Neither is saved for
the backward pass, which asks for it again: under ZeRO-3 the same parameter holds a tensor gathered anew, and a tensor
made of 4 bits lives as long as one product.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccmdist.adapters.kept import is_on_tape, kept


class Dense(Protocol):
    """A module that gives a weight."""

    dtype: torch.dtype
    device: torch.device

    def dense(self) -> Tensor:
        """The weight, (out, in)."""
        ...


def dense(weight: Tensor | Dense) -> Tensor:
    """The values of a weight, (out, in)."""
    return weight if isinstance(weight, Tensor) else weight.dense()


def frozen_product(x: Tensor, weight: Tensor | Dense, bias: Tensor | None) -> Tensor:
    """The product x W^T + bias; x (..., in)."""
    return _FrozenProduct.apply(x, weight, bias)


class FrozenLinear(nn.Linear):
    """A linear layer that is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        """The product x W^T + bias."""
        return frozen_product(x, self.weight, self.bias)


def freeze_linears(model: nn.Module) -> None:
    """Let every plain linear of a model be a :class:`FrozenLinear`; names and weights stay as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Dense, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        (y,) = kept(lambda: (F.linear(x, dense(weight), bias),))
        return y.view(y.shape) if is_on_tape() else y  # what is kept must not become part of a graph

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return grads[0] @ dense(ctx.weight) if ctx.needs_input_grad[0] else None, None, None
