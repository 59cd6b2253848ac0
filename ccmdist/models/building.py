"""A transformer without weights is given memory, whole or cut over the ranks, and its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ccmdist.models.checkpoint_io import OnRows, load_weights


def with_weights(
    model: nn.Module,
    weight_files: dict[str, Path],
    dtype: torch.dtype,
    zero_config: dict[str, Any] | None,
    on_rows: OnRows | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """The same model with its weights.

    Args:
        model: Without weights, and without buffers; changed in place.
        weight_files: Tensor name -> file.
        dtype: Of the weights.
        zero_config: A DeepSpeed configuration: partition the weights over the ranks while they are read
            (collective). None: the whole model in this process.
        on_rows: Told the rows of all weights on the way.
        device: Of a whole model; a partitioned one lies where DeepSpeed puts it.

    Raises:
        ModelError: If the weights do not fit the config.
    """
    if zero_config is None:
        # Not the model's own `to`, which warns of an empty list of modules that have to stay in float32.
        model = nn.Module.to(model, dtype).to_empty(device=device)
    else:
        _partition(model, dtype, zero_config)
    load_weights(model, weight_files, on_rows)
    return model.eval()


class _Owned(nn.Module):
    """Parameters like those that another module owns itself: zero.Init partitions them as this is made."""

    def __init__(self, owner: nn.Module, scratch: Tensor) -> None:
        super().__init__()
        for name, parameter in owner.named_parameters(recurse=False):
            whole = scratch[: parameter.numel()].view(parameter.shape)
            self.register_parameter(name, nn.Parameter(whole))


def _partition(model: nn.Module, dtype: torch.dtype, zero_config: dict[str, Any]) -> None:
    """Give a model without weights partitioned ones, module by module. Collective.

    What is cut is always the same piece of memory, for there are no values yet: to take and free it for each tensor
    would leave holes between the partitions, of half a gigabyte in a model of 1.4.
    """
    import deepspeed  # seconds of import that synthesis must not pay

    assert not any(True for _ in model.buffers()), "zero.Init partitions parameters only"
    # Not by its argument `dtype`, which DeepSpeed 0.19 overrules with bf16 on hosts whose CPU has no fp16.
    stored_as = zero_config | {"bf16": {"enabled": dtype == torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=stored_as):
        scratch = torch.empty(max(parameter.numel() for parameter in model.parameters()), dtype=dtype)
        for module in model.modules():
            for name, parameter in _Owned(module, scratch).named_parameters(recurse=False):
                module.register_parameter(name, parameter)
