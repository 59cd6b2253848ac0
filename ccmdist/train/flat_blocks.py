"""The matrices of a block as one parameter, which DeepSpeed gathers at once and without a copy.

DeepSpeed spends host time on every parameter in every pass, and with more than one in a gather it copies what comes
in together to where each belongs: one small call for every parameter and rank. Layers of ``ccmdist.adapters`` ask for
their weight when they need it, and are given a view of the block's one parameter.
"""

import torch
from torch import Tensor, nn

from ccmdist.train.sharding import is_cut


class FlatWeight(nn.Module):
    """A weight that is a stretch of a parameter which the block owns."""

    def __init__(self, flat: nn.Parameter, start: int, shape: torch.Size) -> None:
        """A weight of ``shape`` from element ``start`` of ``flat`` on."""
        super().__init__()
        self.dtype, self.device = flat.dtype, flat.device
        self._stretch = flat, start, shape.numel(), shape  # in a tuple, or the parameter would be this module's too

    def dense(self) -> Tensor:
        """The weight, (out, in); valid as long as the block is gathered."""
        flat, start, count, shape = self._stretch
        return flat.detach().narrow(1, start, count).view(shape)


def flatten_blocks(blocks: nn.ModuleList) -> None:
    """Let the weights of each block's linears be stretches of one frozen parameter, ``flat``. Collective.

    A block at a time is gathered, put in order, and cut again. Linears of another dtype than most are left as they are.
    """
    for block in blocks:
        linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
        dtypes = [linear.weight.dtype for linear in linears]
        most = max(dtypes, key=dtypes.count)
        _flatten(block, [linear for linear, dtype in zip(linears, dtypes, strict=True) if dtype == most])


def _flatten(block: nn.Module, linears: list[nn.Linear]) -> None:
    import deepspeed  # seconds of import that tests of small parts must not pay

    weights = [linear.weight for linear in linears]
    with deepspeed.zero.GatheredParameters(weights):
        shapes = [weight.shape for weight in weights]
        # A matrix of one row, for vectors are kept whole on every rank.
        flat = nn.Parameter(torch.cat([weight.data.reshape(1, -1) for weight in weights], 1), requires_grad=False)
    if is_cut(weights[0]):
        weights[0].convert_to_zero_parameters(param_list=[flat])
    block.register_parameter("flat", flat)
    start = 0
    for linear, shape in zip(linears, shapes, strict=True):
        del linear.weight
        linear.weight = FlatWeight(flat, start, shape)
        start += shape.numel()
