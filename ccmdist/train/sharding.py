"""Where the frozen weights lie: cut over all ranks, cut over each node's ranks, or whole on every rank.

In all three DeepSpeed ZeRO-3 manages the trainable adapter, so there is one kind of checkpoint, whatever the mode and
the number of ranks. A base that is whole on every rank is hidden from DeepSpeed.
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.errors import ConfigError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.planner.mode import Mode, choose_mode


def settle_sharding(config: TrainConfig, group: ProcessGroup) -> TrainConfig:
    """The settings with ``sharding`` as it is carried out, which rank 0 tells with the reason. Collective.

    Raises:
        ConfigError: If zero3_hpz is asked for where nodes have one rank, or not all the same number; or if ``auto``
            finds nothing that fits.
    """
    mode = _chosen(config, group) if config.sharding == "auto" else _as_set(config.sharding, group)
    log.info("sharding: %s (%s)", mode.sharding, mode.reason)
    return config.model_copy(update={"sharding": mode.sharding})


def _chosen(config: TrainConfig, group: ProcessGroup) -> Mode:
    transformer = ModelFolder.open(config.data.model).config("transformer")
    # Nodes of unequal size have no group of their own for every rank: as if each rank were alone.
    return choose_mode(
        config, transformer, group.ranks.world_size, group.ranks_per_node or 1, _smallest_gpu_bytes(group)
    )


def _as_set(sharding: Literal["zero3", "zero3_hpz", "replicated"], group: ProcessGroup) -> Mode:
    if sharding != "zero3_hpz":
        return Mode(sharding, "as set")
    if group.ranks_per_node is None:
        raise ConfigError(
            "sharding: zero3_hpz cuts the weights over the ranks of each node, and these nodes do not all have the "
            "same number of consecutive ranks",
            "ask Slurm for --ntasks-per-node, or set sharding=zero3",
        )
    if group.ranks_per_node == group.ranks.world_size:
        return Mode("zero3", "zero3_hpz was set; on a single node that is the same")
    if group.ranks_per_node == 1:
        raise ConfigError(
            "sharding: zero3_hpz cuts the weights over the ranks of each node, and each node has one rank: it would "
            "hold them whole, twice over",
            "set sharding=replicated, which holds them once, or sharding=zero3",
        )
    return Mode(sharding, "as set")


def _smallest_gpu_bytes(group: ProcessGroup) -> int | None:
    """Memory of the smallest GPU of all ranks; None on CPUs. Collective."""
    total = torch.cuda.get_device_properties(group.device).total_memory if group.device.type == "cuda" else 0
    return -int(group.maximum([-total])[0]) or None


def hide_frozen_weights(model: torch.nn.Module) -> None:
    """Turn every frozen parameter into a buffer of the same name, for DeepSpeed would cut every parameter.

    Names and values in ``state_dict`` stay as they are.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.data)


def forget_node_copies(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let the partitions that a node keeps of parameters be made anew from those over all ranks when next gathered.

    DeepSpeed makes them when it first cuts a parameter, and does not see that the partitions are filled later.
    """
    parameter: Any
    for parameter in parameters:
        parameter.ds_secondary_tensor = None
