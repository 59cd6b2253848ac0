"""Where the frozen weights lie: cut over all ranks, cut over each node's ranks, or whole on every rank.

In all three DeepSpeed ZeRO-3 manages the trainable adapter, so there is one kind of checkpoint, whatever the mode and
the number of ranks. A base that is whole on every rank is hidden from DeepSpeed.
"""

from collections.abc import Iterable
from typing import Any

import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.models.model_folder import ModelFolder
from ccmdist.planner.memory import tokens_of
from ccmdist.planner.mode import Mode, choose_mode, mode_as_set
from ccmdist.planner.transformer import Transformer


def settle_sharding(config: TrainConfig, group: ProcessGroup) -> TrainConfig:
    """The settings with ``sharding`` as it is carried out, which rank 0 tells with the reason. Collective.

    Raises:
        ConfigError: If zero3_hpz is asked for where nodes have one rank, or not all the same number; or if ``auto``
            finds nothing that fits.
    """
    if config.objective.trains == "network":
        mode = Mode("zero3", f"the only one of objective.kind {config.objective.kind}")
    elif config.sharding == "auto":
        mode = _chosen(config, group)
    else:
        mode = mode_as_set(config.sharding, group.ranks.world_size, group.ranks_per_node)
    log.info("sharding: %s (%s)", mode.sharding, mode.reason)
    return config.model_copy(update={"sharding": mode.sharding})


def _chosen(config: TrainConfig, group: ProcessGroup) -> Mode:
    folder = ModelFolder.open(config.data.model)
    if not folder.layout.is_planned:
        is_one = group.ranks.world_size == 1
        return Mode("replicated" if is_one else "zero3", f"the planner does not know the size of {folder.title}")
    return choose_mode(
        config,
        Transformer.from_config(folder.config("transformer")),
        tokens_of(config, folder.version),
        group.ranks.world_size,
        # Nodes of unequal size have no group of their own for every rank: as if each rank were alone.
        group.ranks_per_node or 1,
        _smallest_gpu_bytes(group),
    )


def _smallest_gpu_bytes(group: ProcessGroup) -> int | None:
    """Memory of the smallest GPU of all ranks; None on CPUs. Collective."""
    total = torch.cuda.get_device_properties(group.device).total_memory if group.device.type == "cuda" else 0
    return -int(group.maximum([-total])[0]) or None


def hide_frozen_weights(model: torch.nn.Module, vectors_alone: bool = False) -> None:
    """Turn frozen parameters into buffers of the same names, whole on every rank. Collective.

    DeepSpeed cuts parameters and leaves buffers alone. Names and values in ``state_dict`` stay as they are.

    Args:
        model: With its weights, possibly cut over the ranks.
        vectors_alone: Hide biases and scales, 0.03 % of the weights, and leave matrices. They are more than half of
            the tensors, and the host spends the same time on each in every pass.
    """
    import deepspeed  # seconds of import that tests of small parts must not pay

    parameter: Any
    buffers: dict[torch.nn.Parameter, torch.Tensor] = {}  # modules that share a parameter share its buffer
    for module in model.modules():
        own = [(name, p) for name, p in module.named_parameters(recurse=False) if not p.requires_grad]
        hidden = [(name, p) for name, p in own if not vectors_alone or len(getattr(p, "ds_shape", p.shape)) < 2]
        with deepspeed.zero.GatheredParameters([parameter for _, parameter in hidden]):
            for name, parameter in hidden:
                delattr(module, name)
                if parameter not in buffers:
                    buffers[parameter] = parameter.data.clone() if is_cut(parameter) else parameter.data
                module.register_buffer(name, buffers[parameter])


def is_cut(parameter: torch.nn.Parameter) -> bool:
    """Whether DeepSpeed has cut a parameter over the ranks."""
    return hasattr(parameter, "ds_tensor")


def forget_node_copies(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let the partitions that a node keeps of parameters be made anew from those over all ranks when next gathered.

    DeepSpeed makes them when it first cuts a parameter, and does not see that the partitions are filled later.
    """
    parameter: Any
    for parameter in parameters:
        parameter.ds_secondary_tensor = None
