"""Where the frozen weights should lie: whole on every rank if they fit, else cut over a node, else over all ranks.

That order is the order of speed: the more ranks hold a piece, the more is sent, and over slower links.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError
from ccmdist.planner.flops import Tokens
from ccmdist.planner.memory import HEADROOM, SHARDINGS, Memory, Sharding, memory
from ccmdist.planner.transformer import Transformer

FASTEST: Final = "the fastest that fits: every GPU holds all frozen weights, and only the adapter's gradients are sent"
REASONS: Final[Mapping[str, str]] = {
    "replicated": FASTEST,
    "zero3_hpz": "whole weights do not fit; cut over each node's GPUs, they are gathered inside the node alone",
    "zero3": "less does not fit; cut over all GPUs, the weights are gathered twice in every micro-step",
}


@dataclass(frozen=True)
class Mode:
    """The place of the frozen weights, as chosen or as set.

    Attributes:
        sharding: Where they lie.
        reason: Why, in one sentence.
    """

    sharding: Sharding
    reason: str


def choose_mode(
    config: TrainConfig,
    model: Transformer,
    of: Tokens,
    num_ranks: int,
    ranks_per_node: int,
    gpu_memory_bytes: float | None,
) -> Mode:
    """The fastest way to hold the frozen weights that fits into the memory of each GPU.

    Args:
        config: Settings of the run; what ``sharding`` says is not looked at.
        model: The MMDiT.
        of: Tokens of one sample.
        num_ranks: Processes that train together, one GPU each.
        ranks_per_node: How many of them share a node.
        gpu_memory_bytes: Of the smallest GPU; None on CPUs.

    Raises:
        ConfigError: If nothing fits, with what would.
    """
    if gpu_memory_bytes is None:
        return _on_cpus(config)
    needs = needed(config, model, of, num_ranks, ranks_per_node)
    for sharding, need in needs.items():
        if need.fits(gpu_memory_bytes):
            told = f"{need.total / 1e9:.1f} of {gpu_memory_bytes / 1e9:.0f} GB by estimate"
            return Mode(sharding, f"{_reason(sharding, needs)} ({told})")
    raise nothing_fits(config, model, of, num_ranks, ranks_per_node, gpu_memory_bytes)


def mode_as_set(sharding: Sharding, num_ranks: int, ranks_per_node: int | None) -> Mode:
    """What becomes of a place that the settings name.

    Args:
        sharding: As set.
        num_ranks: Processes that train together, one GPU each.
        ranks_per_node: How many of them share a node; None where nodes differ in that.

    Raises:
        ConfigError: If zero3_hpz is asked for where nodes have one rank, or not all the same number.
    """
    if sharding != "zero3_hpz":
        return Mode(sharding, "as set")
    if ranks_per_node is None:
        raise ConfigError(
            "sharding: zero3_hpz cuts the weights over the ranks of each node, and these nodes do not all have the "
            "same number of consecutive ranks",
            "ask Slurm for --ntasks-per-node, or set sharding=zero3",
        )
    if ranks_per_node == num_ranks:
        return Mode("zero3", "zero3_hpz was set; on a single node that is the same")
    if ranks_per_node == 1:
        raise ConfigError(
            "sharding: zero3_hpz cuts the weights over the ranks of each node, and each node has one rank: it would "
            "hold them whole, twice over",
            "set sharding=replicated, which holds them once, or sharding=zero3",
        )
    return Mode(sharding, "as set")


def needed(
    config: TrainConfig, model: Transformer, of: Tokens, num_ranks: int, ranks_per_node: int
) -> dict[Sharding, Memory]:
    """Memory per GPU of every mode that the settings and ranks allow, the fastest first."""
    possible = [sharding for sharding in SHARDINGS if why_not(config, sharding, num_ranks, ranks_per_node) is None]
    return {sharding: memory(config, model, of, sharding, num_ranks, ranks_per_node) for sharding in possible}


def why_not(config: TrainConfig, sharding: Sharding, num_ranks: int, ranks_per_node: int) -> str | None:
    """Why a mode makes no sense for these settings and ranks, whatever the memory; None if it does."""
    if sharding == "replicated":
        return None
    if config.is_quantized:
        return f"base {config.base} cannot be cut over ranks"
    if num_ranks == 1:
        return "one GPU has nobody to share with"
    if sharding == "zero3_hpz" and num_ranks <= ranks_per_node:
        return "on one node it is the same as zero3"
    if sharding == "zero3_hpz" and ranks_per_node == 1:
        return "with one GPU per node it would hold the weights whole, twice over"
    return None


def nothing_fits(
    config: TrainConfig, model: Transformer, of: Tokens, num_ranks: int, ranks_per_node: int, gpu_memory_bytes: float
) -> ConfigError:
    """The error for a run that fits in no mode, with changes that would make it fit."""
    needs = needed(config, model, of, num_ranks, ranks_per_node)
    told = ", ".join(f"{sharding} {need.total / 1e9:.1f} GB" for sharding, need in needs.items())
    usable = (1 - HEADROOM) * gpu_memory_bytes
    fitting = [
        f"{change} ({need.total / 1e9:.1f} GB)"
        for change, need in _changes(config, model, of, num_ranks, ranks_per_node)
        if need.fits(gpu_memory_bytes)
    ]
    remedy = f"would fit: {'; '.join(fitting)}" if fitting else "take GPUs with more memory, or a smaller image_size_px"
    return ConfigError(
        f"sharding: nothing fits {num_ranks} x {gpu_memory_bytes / 1e9:.0f} GB, of which {usable / 1e9:.1f} GB can be "
        f"planned with (estimates: {told})",
        remedy,
    )


def _on_cpus(config: TrainConfig) -> Mode:
    if config.is_quantized:
        return Mode("replicated", f"base {config.base} cannot be cut over ranks")
    return Mode("zero3", "ranks on CPUs share one memory, so the weights are held once")


def _reason(sharding: Sharding, needs: Mapping[Sharding, Memory]) -> str:
    if sharding == "zero3" and "zero3_hpz" not in needs:
        return "whole weights do not fit; cut over all GPUs, they are gathered twice in every micro-step"
    return REASONS[sharding] if len(needs) > 1 else "the only mode for these settings"


def _changes(
    config: TrainConfig, model: Transformer, of: Tokens, num_ranks: int, ranks_per_node: int
) -> Iterator[tuple[str, Memory]]:
    """Changes of the settings that save memory, each with the memory that the leanest mode then needs."""
    lean = {"activation_checkpointing": "full"}
    for change in (
        lean,
        lean | {"micro_batch_size": 1},
        lean | {"base": "nf4"},
        lean | {"base": "nf4", "micro_batch_size": 1},
    ):
        changed = config.model_copy(update=change)
        news = [f"{name}={value}" for name, value in change.items() if getattr(config, name) != value]
        needs = needed(changed, model, of, num_ranks, ranks_per_node)
        yield " ".join(news), min(needs.values(), key=lambda need: need.total)
    for factor in (2, 4, 8, 16):
        more = num_ranks * factor
        if why_not(config, "zero3", more, ranks_per_node) is None:
            yield f"{more} GPUs", memory(config, model, of, "zero3", more, ranks_per_node)
