"""The plan of a training run: what it computes, holds and sends, how long it takes, and in which mode it is fastest."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError
from ccmdist.models.template import Version
from ccmdist.planner.flops import Recompute, StepFlops, Tokens
from ccmdist.planner.hardware import Machine, gpu_named
from ccmdist.planner.memory import SHARDINGS, Memory, Sharding, is_tabled, memory, num_trained, tokens_of
from ccmdist.planner.mode import Mode, choose_mode, mode_as_set, why_not
from ccmdist.planner.time import Finish, StepTime, finish, flops_of, forward_flops_of, step_time
from ccmdist.planner.traffic import Traffic, traffic
from ccmdist.planner.transformer import Transformer

JOB: Final = SlurmSettings()
"""A job of which nothing is said."""
RECOMPUTES: Final[tuple[Recompute, ...]] = ("full", "selective", "none")


@dataclass(frozen=True)
class Choice:
    """One mode on one machine.

    Attributes:
        sharding: Where the frozen weights lie.
        memory: Bytes on each GPU, estimated.
        is_possible: Whether the mode makes sense for the settings and ranks at all.
        is_fitting: Whether the memory fits with head-room.
        step: Predicted time of a step.
        images_per_s: Of all GPUs, predicted, overlapped.
        why_not: Why this mode is not the chosen one; "" for the chosen one.
    """

    sharding: Sharding
    memory: Memory
    is_possible: bool
    is_fitting: bool
    step: StepTime
    images_per_s: float
    why_not: str


@dataclass(frozen=True)
class Variant:
    """The run with one setting changed that costs time or memory, never a result.

    Attributes:
        change: The setting, as one would write it.
        memory_bytes: On each GPU, estimated.
        is_fitting: Whether that fits with head-room.
        images_per_s: Of all GPUs, predicted, overlapped.
    """

    change: str
    memory_bytes: float
    is_fitting: bool
    images_per_s: float


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        machine: On which it is to run.
        base: Form of the frozen weights.
        num_parameters: Of the model.
        num_resident_parameters: Of it as it is trained: without what a table replaces.
        num_trained: Values of the adapter, or of all.
        does_grow: Whether that is what the adapter has when every rank is the largest.
        num_adapters: That are trained in turn.
        tokens: Of one sample, of the largest if a part of the steps fills holes.
        completion_share: That part.
        forward_flops: Of the model without adapter, one sample; the mean over steps, as the next.
        step_flops: Of a training step, one sample.
        sharding: The mode, as chosen or as set.
        reason: Why.
        choices: Every mode, the chosen one among them.
        variants: The chosen mode with each way of computing activations again.
        traffic: Bytes that each GPU receives in the chosen mode.
        finish: Predicted course; None if the time limit is too short for a single step.
        time_limit_s: Of one job.
    """

    machine: Machine
    base: str
    num_parameters: int
    num_resident_parameters: int
    num_trained: int
    does_grow: bool
    num_adapters: int
    tokens: Tokens
    completion_share: float
    forward_flops: float
    step_flops: StepFlops
    sharding: Sharding
    reason: str
    choices: tuple[Choice, ...]
    variants: tuple[Variant, ...]
    traffic: Traffic
    finish: Finish | None
    time_limit_s: float

    @property
    def chosen(self) -> Choice:
        """The mode, as chosen or as set."""
        return next(choice for choice in self.choices if choice.sharding == self.sharding)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON types, with the sums that people ask for."""
        values = asdict(self)
        values["step_flops"] |= {"model": self.step_flops.model, "executed": self.step_flops.executed}
        values["traffic"]["per_step"] = self.traffic.per_step
        for told, choice in zip(values["choices"], self.choices, strict=True):
            told["memory"]["total"] = choice.memory.total
            told["step"] |= {"overlapped_s": choice.step.overlapped_s, "in_turn_s": choice.step.in_turn_s}
        return values


def plan(
    config: TrainConfig,
    transformer: Mapping[str, Any],
    machine: Machine,
    version: Version = "2509",
    num_text_tokens: int | None = None,
    time_limit_s: float = 60 * JOB.time_limit_min,
    signal_lead_s: float = JOB.signal_lead_s,
) -> Plan:
    """Plan a run.

    Args:
        config: Its settings.
        transformer: The transformer's config.json.
        machine: On which it is to run.
        version: Of Qwen-Image-Edit, which decides the tokens of the text stream.
        num_text_tokens: Of the text stream, if the cache knows it.
        time_limit_s: Of one job.
        signal_lead_s: Before the limit, when a job commits and ends.

    Raises:
        ConfigError: If the batch does not divide over the GPUs, nothing fits into their memory, the mode that is set
            makes no sense on them, or a budget of ranks does not suffice for all linears.
        ModelError: If the transformer's config.json is not understood.
    """
    check_batch(config, machine.num_gpus)
    model, of = Transformer.from_config(transformer), tokens_of(config, version, num_text_tokens)
    check_growth(config, model)
    mode = _mode(config, model, of, machine)
    sharding = mode.sharding
    choices = tuple(_choice(config, model, of, other, sharding, machine) for other in SHARDINGS)
    step = next(choice.step for choice in choices if choice.sharding == sharding)
    return Plan(
        machine=machine,
        base=config.base,
        num_parameters=model.num_parameters,
        num_resident_parameters=model.num_resident_parameters(is_tabled(config, model)),
        num_trained=num_trained(config, model),
        does_grow=config.adapter.growth is not None,
        num_adapters=config.objective.num_adapters,
        tokens=of,
        completion_share=config.objective.completion_share,
        forward_flops=forward_flops_of(config, model, of),
        step_flops=flops_of(config, model, of),
        sharding=sharding,
        reason=mode.reason,
        choices=choices,
        variants=tuple(_variant(config, model, of, sharding, machine, recompute) for recompute in RECOMPUTES),
        traffic=traffic(config, model, sharding, machine.num_gpus, machine.gpus_per_node),
        finish=finish(config, model, step, sharding, machine, time_limit_s, signal_lead_s),
        time_limit_s=time_limit_s,
    )


def check_batch(config: TrainConfig, num_ranks: int) -> None:
    """Refuse, as training would, a batch that does not divide over the ranks.

    Raises:
        ConfigError: With the nearest sizes that do.
    """
    unit = config.micro_batch_size * num_ranks
    if config.global_batch_size % unit:
        below = config.global_batch_size // unit * unit
        sizes = " or ".join(str(size) for size in (below, below + unit) if size)
        raise ConfigError(
            f"global_batch_size {config.global_batch_size}: {num_ranks} GPUs with micro_batch_size "
            f"{config.micro_batch_size} need a multiple of {unit}",
            f"use global_batch_size={sizes}, or fewer --gpus",
        )


def check_growth(config: TrainConfig, model: Transformer) -> None:
    """Refuse, as training would, a budget of ranks that does not suffice for all adapted linears.

    Raises:
        ConfigError: With both numbers.
    """
    if config.adapter.growth:
        config.adapter.growth.check_budget(len(list(model.adapted(config.adapter.targets))))


def _mode(config: TrainConfig, model: Transformer, of: Tokens, machine: Machine) -> Mode:
    if config.sharding != "auto":
        return mode_as_set(config.sharding, machine.num_gpus, machine.gpus_per_node)
    limit = gpu_named(machine.gpu).memory_bytes
    return choose_mode(config, model, of, machine.num_gpus, machine.gpus_per_node, limit)


def _choice(
    config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, chosen: Sharding, machine: Machine
) -> Choice:
    need = memory(config, model, of, sharding, machine.num_gpus, machine.gpus_per_node)
    step = step_time(config, model, of, sharding, machine)
    is_fitting = need.fits(gpu_named(machine.gpu).memory_bytes)
    impossible = why_not(config, sharding, machine.num_gpus, machine.gpus_per_node)
    reason = "" if sharding == chosen else impossible or ("sends more" if is_fitting else "does not fit")
    images_per_s = config.global_batch_size / step.overlapped_s
    return Choice(sharding, need, impossible is None, is_fitting, step, images_per_s, reason)


def _variant(
    config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, machine: Machine, recompute: Recompute
) -> Variant:
    changed = config.model_copy(update={"activation_checkpointing": recompute})
    choice = _choice(changed, model, of, sharding, sharding, machine)
    name = f"activation_checkpointing={recompute}"
    return Variant(name, choice.memory.total, choice.is_fitting, choice.images_per_s)
