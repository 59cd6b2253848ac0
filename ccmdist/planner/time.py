"""How long a step, a start and a whole run will take: predicted from operations, bytes and assumed efficiencies.

Two bounds of a micro-step are told. Overlapped: the longer of computing and sending, which is what prefetching is for.
In turn: their sum. What a host does between kernels is not counted; it shows at a micro-batch of 1.
"""

import math
from dataclasses import dataclass
from typing import Final

from ccmdist.config.train import TrainConfig
from ccmdist.planner.flops import StepFlops, Tokens, forward_flops, norm_flops, step_flops
from ccmdist.planner.hardware import HBM_SHARE, Machine, gpu_named
from ccmdist.planner.memory import (
    Sharding,
    is_tabled,
    num_trained,
    resident_share,
    shares,
    table_bytes,
    weight_bytes,
)
from ccmdist.planner.traffic import GATHERS, traffic
from ccmdist.planner.transformer import Transformer

OPTIMIZER_BYTES: Final = 28
"""That an update of AdamW reads and writes of each trained value: gradient; weight and two moments, twice."""
DEQUANTISED_BYTES: Final = 0.5 + 2 + 2
"""That each use of a 4-bit weight reads and writes beyond the product itself."""
SETUP_S: Final = 60.0
"""Imports, finding the other ranks, the first step's kernels. Assumed."""
NUM_NOISE_LEVELS: Final = {"bf16": 425, "fp32": 1000}
"""Of the training grid, for which the table has a row: bf16 rounds many to one value (counted at 256 px)."""


@dataclass(frozen=True)
class StepTime:
    """Predicted seconds of an optimizer step.

    Attributes:
        compute_s: Of a micro-step, sending nothing.
        send_s: Of a micro-step, computing nothing.
        num_micro_steps: In an optimizer step.
        update_s: Norms, update of the adapter and its gathering, once per step.
        monitor_s: Validation and pictures, spread over all steps.
        break_even: Samples of a micro-batch from which computing takes longer than sending.
    """

    compute_s: float
    send_s: float
    num_micro_steps: int
    update_s: float
    monitor_s: float
    break_even: float

    @property
    def overlapped_s(self) -> float:
        """If all sending hides behind computing, or the reverse."""
        return self.num_micro_steps * max(self.compute_s, self.send_s) + self.update_s

    @property
    def in_turn_s(self) -> float:
        """If nothing overlaps."""
        return self.num_micro_steps * (self.compute_s + self.send_s) + self.update_s


@dataclass(frozen=True)
class Finish:
    """Predicted course of a run.

    Attributes:
        startup_s: Of each start of the job.
        startup_bytes: That each node reads.
        work_s: Of all steps, with validation and pictures.
        num_starts: Of the job, of which each may run until its time limit.
        total_s: Work and starts; without waiting in the queue.
        gpu_hours: Of all GPUs together.
    """

    startup_s: float
    startup_bytes: float
    work_s: float
    num_starts: int
    total_s: float
    gpu_hours: float


def flops_of(config: TrainConfig, model: Transformer, of: Tokens) -> StepFlops:
    """Operations of a training step for one sample, with the settings of a run: the mean over its steps."""
    adapter, tabled = config.adapter, is_tabled(config, model)
    found = StepFlops(0.0, 0.0, 0.0)
    for share, kind in shares(config, of):
        recompute = config.activation_checkpointing
        found += step_flops(model, kind, adapter.lora_rank, adapter.targets, recompute, tabled) * share
    return found


def forward_flops_of(config: TrainConfig, model: Transformer, of: Tokens) -> float:
    """Operations of one forward pass without an adapter for one sample: the mean over the steps of a run."""
    return sum(share * forward_flops(model, kind, is_tabled(config, model)) for share, kind in shares(config, of))


def step_time(config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, machine: Machine) -> StepTime:
    """Predicted time of a step of ``config`` on ``machine``."""
    sent = traffic(config, model, sharding, machine.num_gpus, machine.gpus_per_node)
    rate, over_all = machine.efficiency * gpu_named(machine.gpu).flops_per_s, machine.bytes_per_s(machine.num_gpus)
    per_sample = flops_of(config, model, of).executed / rate
    gather_s = sent.weights_per_micro_step / machine.bytes_per_s(sent.num_weight_ranks)
    send_s = gather_s + sent.gradients_per_micro_step / over_all
    fixed_s = _dequantising_s(config, model, machine)
    forward_s = sum(_forward_s(config, model, kind, machine, gather_s) for _, kind in shares(config, of))
    return StepTime(
        compute_s=config.micro_batch_size * per_sample + fixed_s,
        send_s=send_s,
        num_micro_steps=sent.num_micro_steps,
        update_s=sent.adapter_per_step / over_all + _update_s(config, model, machine),
        monitor_s=_num_monitor_forwards(config, machine.num_gpus) * forward_s,
        break_even=max(send_s - fixed_s, 0.0) / per_sample,
    )


def finish(
    config: TrainConfig,
    model: Transformer,
    step: StepTime,
    sharding: Sharding,
    machine: Machine,
    time_limit_s: float,
    signal_lead_s: float,
) -> Finish | None:
    """Predicted course of a run whose jobs may take ``time_limit_s``; None if no job gets past its start.

    Args:
        config: Settings of the run.
        model: The MMDiT.
        step: Predicted time of a step.
        sharding: Where the frozen weights lie: it decides what a start reads.
        machine: On which it runs.
        time_limit_s: Of one job.
        signal_lead_s: Before the limit, when a job commits and ends.
    """
    num_bytes = startup_bytes(config, model, sharding, machine)
    startup_s = SETUP_S + num_bytes / machine.file_system_bytes_per_s
    step_s = step.overlapped_s + step.monitor_s
    steps_per_start = int((time_limit_s - signal_lead_s - startup_s) / step_s)
    if steps_per_start < 1:
        return None
    num_starts = math.ceil(config.num_steps / steps_per_start)
    work_s = config.num_steps * step_s
    total_s = work_s + num_starts * startup_s
    return Finish(startup_s, num_bytes, work_s, num_starts, total_s, total_s * machine.num_gpus / 3600)


def startup_bytes(config: TrainConfig, model: Transformer, sharding: Sharding, machine: Machine) -> float:
    """Bytes that each node reads at a start: its ranks' parts of the bf16 files, or all of them once, and the table."""
    tabled = is_tabled(config, model)
    share = 1.0 if sharding == "replicated" else resident_share("zero3", machine.num_gpus, 1) * machine.gpus_per_node
    return 2.0 * model.num_resident_parameters(tabled) * share + tabled * table_bytes(
        model, NUM_NOISE_LEVELS["fp32" if config.base == "fp32" else "bf16"]
    )


def _update_s(config: TrainConfig, model: Transformer, machine: Machine) -> float:
    """Of the norms, which read every adapted weight once, and of AdamW on this rank's part."""
    gpu, adapter = gpu_named(machine.gpu), config.adapter
    # Of two adapters a step updates one.
    moved = OPTIMIZER_BYTES * num_trained(config, model) / config.objective.num_adapters / machine.num_gpus
    operations = 0.0
    if adapter.kind == "wdlora":
        moved += weight_bytes(config, model)
        operations = norm_flops(model, adapter.lora_rank, adapter.targets)
    return moved / (HBM_SHARE * gpu.hbm_bytes_per_s) + operations / (machine.efficiency * gpu.flops_per_s)


def _dequantising_s(config: TrainConfig, model: Transformer, machine: Machine) -> float:
    """Of turning 4-bit or 8-bit weights into bf16 in every pass of a micro-step: estimate."""
    if not config.is_quantized:
        return 0.0
    passes = 3 if config.activation_checkpointing == "full" else 2
    weights = model.num_resident_parameters(is_tabled(config, model))
    return passes * weights * DEQUANTISED_BYTES / (HBM_SHARE * gpu_named(machine.gpu).hbm_bytes_per_s)


def _forward_s(config: TrainConfig, model: Transformer, of: Tokens, machine: Machine, gather_s: float) -> float:
    """Of a forward pass of one sample, as validation and pictures make it."""
    rate = machine.efficiency * gpu_named(machine.gpu).flops_per_s
    return max(forward_flops(model, of, is_tabled(config, model)) / rate, gather_s / GATHERS)


def _num_monitor_forwards(config: TrainConfig, num_ranks: int) -> float:
    """Forward passes of each adapter per step, on average: held-out samples are shared by the ranks, pictures not."""
    validation, monitor = config.validation, config.monitor
    held_out = math.ceil(validation.num_samples / num_ranks) * len(validation.sigmas) / validation.every_steps
    every = monitor.images_every_steps
    return held_out + (monitor.num_images * monitor.denoise_steps / every if every else 0.0)
