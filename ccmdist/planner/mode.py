"""Where the frozen weights should lie: whole on every rank if they fit, else cut over a node, else over all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError

BYTES_PER_WEIGHT: Final = {"bf16": 2.0, "fp32": 4.0, "nf4": 0.57, "int8": 1.03}
NUM_PARAMETERS_PER_D2: Final = 36
"""Weights of a block divided by the square of its width: 12 per stream, and 12 of the modulation."""


@dataclass(frozen=True)
class Mode:
    """The chosen place of the frozen weights.

    Attributes:
        sharding: "zero3", "zero3_hpz" or "replicated".
        reason: Why, in one sentence.
    """

    sharding: str
    reason: str


def choose_mode(
    config: TrainConfig,
    transformer: Mapping[str, Any],
    num_ranks: int,
    ranks_per_node: int,
    gpu_memory_bytes: int | None,
) -> Mode:
    """The fastest way to hold the frozen weights that fits into the memory of each GPU.

    Args:
        config: Settings of the run; what ``sharding`` says is not looked at.
        transformer: The transformer's config.json.
        num_ranks: Processes that train together, one GPU each.
        ranks_per_node: How many of them share a node.
        gpu_memory_bytes: Of the smallest GPU; None on CPUs.

    Raises:
        ConfigError: If nothing fits.
    """
    if config.base in ("nf4", "int8"):
        return Mode("replicated", f"base {config.base} is only supported whole on every rank")
    if gpu_memory_bytes is None:
        return Mode("zero3", "ranks on CPUs share one memory, so the weights are held once")
    width = transformer.get("num_attention_heads", 24) * transformer.get("attention_head_dim", 128)
    weights = NUM_PARAMETERS_PER_D2 * width**2 * transformer.get("num_layers", 60) * BYTES_PER_WEIGHT[config.base]
    room = 0.5 * gpu_memory_bytes
    if weights <= room or num_ranks == 1:
        return Mode("replicated", "the weights fit whole into each GPU, and nothing is gathered")
    if weights / ranks_per_node > room:
        raise ConfigError(f"the model does not fit: {weights / 1e9:.0f} GB of weights", "take more GPUs, or base=nf4")
    if num_ranks > ranks_per_node > 1:
        return Mode("zero3_hpz", "the weights are gathered inside each node, not over the network")
    return Mode("zero3", "the weights do not fit whole into each GPU")
