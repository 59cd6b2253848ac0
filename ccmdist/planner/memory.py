"""Bytes that a training run takes on each GPU, part by part.

Exact: weights, adapter, optimizer (tests compare them with the real classes and engine). Activations rest on
coefficients that say where they come from. An estimate or an assumption is called one.

Symbols: d width of a token, T tokens of a micro-batch, N ranks.
"""

from dataclasses import dataclass, replace
from typing import Final, Literal

from ccmdist.config.train import TrainConfig
from ccmdist.models.sizes import NF4_BYTES
from ccmdist.models.template import Version
from ccmdist.planner.flops import Tokens, tokens
from ccmdist.planner.transformer import Transformer

Sharding = Literal["zero3", "zero3_hpz", "replicated"]
SHARDINGS: Final[tuple[Sharding, ...]] = ("replicated", "zero3_hpz", "zero3")
"""From the one that sends least to the one that sends most."""

HELD_AS: Final = {"bf16": 2.0, "fp32": 4.0, "nf4": 2.0, "int8": 2.0}
"""Bytes of a weight outside the linears of the blocks, and of an activation."""
INT8_ROW_BYTES: Final = 4
"""Scale of a row beside its 8-bit weights."""
MOMENT_BYTES: Final = {"adamw": 2 * 4.0, "adamw8bit": 2 * (1 + 4 / 256)}
"""Of one trained value: two moments in fp32, or in 8 bits with a 32-bit scale for 256 (bitsandbytes)."""

KEPT: Final = {"wdlora": 50.4, "lora": 47.7}
"""Bytes / (d T) that autograd keeps of a block in bf16, its output counted and its input not. Measured on one block of
the real width with lora_rank 64 and 1,408 tokens, on a CPU, by counting live tensors; as the next two."""
KEPT_SELECTIVE: Final = 22.3
"""The same when matrix products and attention are kept and all else is computed again."""
KEPT_FULL: Final = 2.0
"""The same when the whole block is computed again: its output alone. Exact."""
PEAK: Final = {"wdlora": 58.4, "lora": 59.7}
"""The most that is alive at once in a block's forward and backward pass; it hardly depends on what is kept."""
LIVE_BLOCKS: Final = 2
"""That the engine lets ZeRO-3 keep gathered: one that computes, and the next on its way."""
REDUCE_BUCKET: Final = 50_000_000
"""Gradients in fp32 that the engine lets DeepSpeed send at once: a buffer that is allocated whole."""
ROW_VALUES: Final = 6
"""fp32 values that WDLoRA keeps of each row of an adapted linear."""
BIRTH_BYTES: Final = 4
"""Of each trained value whose rank may grow: the step at which it became active."""
LIBRARIES: Final = 1.5e9
"""CUDA context, cuBLAS, NCCL. Assumed."""
VAE_WEIGHTS: Final = 126.9e6
VAE_DECODE_PER_PX: Final = 96 * 4 * 8
"""Bytes per pixel while pictures are decoded in fp32: about eight of its widest tensors. Estimate."""
HEADROOM: Final = 0.08
"""Share of the memory that is left to the allocator's gaps. Assumed."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU.

    Attributes:
        weights: Frozen weights that lie here all the time.
        gathered: Frozen weights of other ranks while they are used.
        adapter: What is trained, in fp32, as it is used and as it is updated, with norms.
        gradients: Of the adapter, with the buffer in which they are sent.
        moments: Of the optimizer, and the moving average if there is one; where ranks grow, since when each has.
        activations: What is kept for the backward pass, and the peak within a block.
        libraries: What CUDA and its libraries take.
    """

    weights: float
    gathered: float
    adapter: float
    gradients: float
    moments: float
    activations: float
    libraries: float = LIBRARIES

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())

    def fits(self, gpu_memory_bytes: float) -> bool:
        """Whether it fits a GPU with head-room."""
        return self.total <= (1 - HEADROOM) * gpu_memory_bytes


def is_tabled(config: TrainConfig, model: Transformer) -> bool:
    """Whether the run replaces the modulation by a table: if it is asked for and no adapter sits there."""
    return config.tabulate_modulation and not model.is_modulation_adapted(config.adapter.targets)


def tokens_of(config: TrainConfig, version: Version = "2509", num_text: int | None = None) -> Tokens:
    """Tokens of the largest sample of a run; other arguments as of :func:`ccmdist.planner.flops.tokens`."""
    is_holed = config.objective.completion_share > 0
    return tokens(config.data.image_size_px, version, num_text, is_holed)


def shares(config: TrainConfig, of: Tokens) -> list[tuple[float, Tokens]]:
    """Kinds of samples of a run: the share of steps that train on each, and its tokens, those with a hole last.

    Args:
        config: Settings of the run.
        of: Its largest sample, from :func:`tokens_of`.
    """
    completion = config.objective.completion_share
    kinds = [(1 - completion, replace(of, holed=0)), (completion, of)]
    return [(share, tokens) for share, tokens in kinds if share]


def memory(
    config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, num_ranks: int, ranks_per_node: int
) -> Memory:
    """Bytes on each GPU.

    Args:
        config: Settings of the run; its own ``sharding`` is not looked at.
        model: The MMDiT.
        of: Tokens of the largest sample.
        sharding: Where the frozen weights lie.
        num_ranks: N, one GPU each.
        ranks_per_node: How many of them share a node.
    """
    trained = num_trained(config, model)
    average = 4.0 if config.optim.ema_decay is not None else 0.0
    births = BIRTH_BYTES if config.adapter.growth else 0.0
    return Memory(
        weights=_resident_bytes(config, model, resident_share(sharding, num_ranks, ranks_per_node)),
        gathered=_gathered_bytes(config, model, sharding, num_ranks),
        adapter=_adapter_bytes(trained, sharding, num_ranks, ranks_per_node) + _norm_bytes(config, model),
        # This rank's part is accumulated, and copied once more for the optimizer.
        gradients=4.0 * REDUCE_BUCKET + 8.0 * trained / num_ranks,
        moments=(MOMENT_BYTES[config.optim.kind] + average + births) * trained / num_ranks,
        activations=max(activation_bytes(config, model, of), _picture_bytes(config)),
    )


def num_trained(config: TrainConfig, model: Transformer) -> int:
    """Values of the adapter, or of two; where ranks grow, as many as there are if all reach the largest rank."""
    rank, has_magnitude = config.adapter.lora_rank, config.adapter.kind == "wdlora"
    adapted = [linear for _, linear in model.adapted(config.adapter.targets)]
    of_each = sum(rank * (linear.num_in + linear.num_out) + has_magnitude * linear.num_out for linear in adapted)
    return config.objective.num_adapters * of_each


def weight_bytes(config: TrainConfig, model: Transformer) -> float:
    """Bytes of all frozen weights in the form of the run's base."""
    tabled = is_tabled(config, model)
    linears = model.block + (() if tabled else model.modulation)
    in_linears = model.num_layers * sum(linear.num_weights for linear in linears)
    rest = model.num_resident_parameters(tabled) - in_linears
    if config.base == "nf4":
        return in_linears * NF4_BYTES + rest * HELD_AS["nf4"]
    if config.base == "int8":
        rows = model.num_layers * sum(linear.num_out for linear in linears)
        return in_linears + rows * INT8_ROW_BYTES + rest * HELD_AS["int8"]
    return (in_linears + rest) * HELD_AS[config.base]


def block_bytes(config: TrainConfig, model: Transformer) -> float:
    """Bytes of the frozen matrices of one block, which are gathered together."""
    linears = model.block + (() if is_tabled(config, model) else model.modulation)
    return sum(linear.num_weights for linear in linears) * HELD_AS[config.base]


def cut_bytes(config: TrainConfig, model: Transformer) -> float:
    """Of those, bytes that ZeRO-3 cuts and gathers: matrices. Biases and scales are whole on every rank."""
    return weight_bytes(config, model) - _vector_bytes(config, model)


def resident_share(sharding: Sharding, num_ranks: int, ranks_per_node: int) -> float:
    """Part of the frozen matrices that lies on each rank. zero3_hpz has the node's share beside its share of all."""
    if sharding == "replicated":
        return 1.0
    return 1 / num_ranks + (1 / ranks_per_node if sharding == "zero3_hpz" else 0.0)


def activation_bytes(config: TrainConfig, model: Transformer, of: Tokens) -> float:
    """Bytes that a micro-batch keeps for its backward pass, and those of one block at work."""
    kind, scale = config.adapter.kind, HELD_AS[config.base] / 2
    kept = {"full": KEPT_FULL, "selective": KEPT_SELECTIVE, "none": KEPT[kind]}[config.activation_checkpointing]
    per_block = model.width * of.total * config.micro_batch_size * scale
    at_work = PEAK[kind] - (0.0 if config.activation_checkpointing == "full" else kept)
    return (model.num_layers * kept + at_work) * per_block + _dequantised_bytes(config, model)


def table_bytes(model: Transformer, num_noise_levels: int) -> float:
    """Bytes of the table that replaces the modulation; it lies in host memory, once per node."""
    per_row = model.num_layers * sum(linear.num_out for linear in model.modulation) + model.width
    return 2.0 * per_row * (num_noise_levels + model.is_clean_mask_timed)


def _gathered_bytes(config: TrainConfig, model: Transformer, sharding: Sharding, num_ranks: int) -> float:
    if sharding == "replicated" or num_ranks == 1:
        return 0.0
    return LIVE_BLOCKS * block_bytes(config, model)


def _resident_bytes(config: TrainConfig, model: Transformer, share: float) -> float:
    return _vector_bytes(config, model) + cut_bytes(config, model) * share


def _vector_bytes(config: TrainConfig, model: Transformer) -> float:
    return model.num_resident_vectors(is_tabled(config, model)) * HELD_AS[config.base]


def _adapter_bytes(trained: int, sharding: Sharding, num_ranks: int, ranks_per_node: int) -> float:
    """Whole, as forward uses it; and twice this rank's part: DeepSpeed's partition and the optimizer's master."""
    of_node = 4.0 / ranks_per_node if sharding == "zero3_hpz" else 0.0
    # The partition of a single rank is whole itself.
    whole = 4.0 if num_ranks > 1 else 0.0
    return trained * (whole + 8.0 / num_ranks + of_node)


def _norm_bytes(config: TrainConfig, model: Transformer) -> float:
    if config.adapter.kind != "wdlora":
        return 0.0
    num_rows = sum(linear.num_out for _, linear in model.adapted(config.adapter.targets))
    return 4.0 * ROW_VALUES * config.objective.num_adapters * num_rows


def _dequantised_bytes(config: TrainConfig, model: Transformer) -> float:
    """The largest linear of a block in bf16, while it is used."""
    return 2.0 * max(i.num_weights for i in model.block) if config.is_quantized else 0.0


def _picture_bytes(config: TrainConfig) -> float:
    """The VAE while pictures are decoded on the first rank: nothing is kept for a backward pass then."""
    if not config.monitor.images_every_steps:
        return 0.0
    return 4 * VAE_WEIGHTS + VAE_DECODE_PER_PX * config.data.image_size_px**2
