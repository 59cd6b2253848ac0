"""A transformer without weights is given memory, whole or cut over the ranks, and its weights."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn

from ccmdist.models.checkpoint_io import OnRows, load_weights


def without_weights(model_class: Any, config: Mapping[str, Any]) -> Any:
    """A model of diffusers whose parameters have no memory, to look at its structure; its buffers have their values."""
    with no_init_weights(), init_empty_weights():
        return model_class.from_config(config)


def with_weights(
    model: nn.Module,
    weight_files: dict[str, Path],
    dtype: torch.dtype,
    zero_config: dict[str, Any] | None,
    on_rows: OnRows | None = None,
    device: torch.device | str = "cpu",
    in_fp32: str | None = None,
    stored_as: Mapping[str, str] | None = None,
) -> nn.Module:
    """The same model with its weights.

    Args:
        model: Without weights; buffers that it has are not stored, and have their values. Changed in place.
        weight_files: Tensor name -> file.
        dtype: Of the weights.
        zero_config: A DeepSpeed configuration: partition the weights over the ranks while they are read
            (collective). None: the whole model in this process.
        on_rows: Told the rows of all weights on the way.
        device: Of a whole model, and of buffers; a partitioned one lies where DeepSpeed puts it.
        in_fp32: What the names of weights match that are in fp32 whatever ``dtype`` says.
        stored_as: Tensor name -> another one that its file has for it.

    Raises:
        ModelError: If the weights do not fit the config.
    """
    dtypes = {name: dtype_of(name, dtype, in_fp32) for name, _ in model.named_parameters()}
    if zero_config is None:
        allocate(model, dtypes, device)
    else:
        for one in dict.fromkeys(dtypes.values()):
            _partition(model, {name for name, its in dtypes.items() if its == one}, one, zero_config)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    load_weights(model, weight_files, on_rows, stored_as=stored_as)
    return model.eval()


def allocate(model: nn.Module, dtypes: Mapping[str, torch.dtype], device: torch.device | str) -> None:
    """Give parameters without memory some, on a device; buffers, which are computed, are left alone.

    Args:
        model: Changed in place.
        dtypes: Of each parameter.
        device: Where to.
    """
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        empty = torch.empty(parameter.shape, dtype=dtypes[name], device=device)
        made = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        model.get_submodule(owner).register_parameter(last, made)


def dtype_of(name: str, dtype: torch.dtype, in_fp32: str | None) -> torch.dtype:
    """Of the weight called ``name``; arguments as of :func:`with_weights`."""
    return torch.float32 if in_fp32 and re.search(in_fp32, name) else dtype


class _Owned(nn.Module):
    """Parameters like some that another module owns itself: zero.Init partitions them as this is made."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], scratch: Tensor) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            whole = scratch[: parameter.numel()].view(parameter.shape)
            self.register_parameter(name, nn.Parameter(whole))


def _partition(model: nn.Module, names: Collection[str], dtype: torch.dtype, zero_config: dict[str, Any]) -> None:
    """Give the parameters called ``names``, which have no memory, partitioned ones, module by module. Collective.

    What is cut is always the same piece of memory, for there are no values yet: to take and free it for each tensor
    would leave holes between the partitions, of half a gigabyte in a model of 1.4.
    """
    import deepspeed  # seconds of import that synthesis must not pay

    stored = model.state_dict().keys()
    assert not any(name in stored for name, _ in model.named_buffers()), "zero.Init partitions parameters only"
    # Not by its argument `dtype`, which DeepSpeed 0.19 overrules with bf16 on hosts whose CPU has no fp16.
    stored_as = zero_config | {"bf16": {"enabled": dtype == torch.bfloat16}}
    with deepspeed.zero.Init(config_dict_or_path=stored_as):
        largest = max(parameter.numel() for name, parameter in model.named_parameters() if name in names)
        scratch = torch.empty(largest, dtype=dtype)
        for owner, module in model.named_modules():
            own = {n: p for n, p in module.named_parameters(recurse=False) if f"{owner}.{n}".lstrip(".") in names}
            for name, parameter in _Owned(own, scratch).named_parameters(recurse=False):
                module.register_parameter(name, parameter)
