"""How well a run is predicted to scale: images per second and GPU, relative to one GPU that sends nothing."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ccmdist.config.train import TrainConfig
from ccmdist.models.template import Version
from ccmdist.planner.flops import Tokens
from ccmdist.planner.hardware import EFFICIENCY, FABRICS, Machine, gpu_named
from ccmdist.planner.memory import SHARDINGS, Sharding, memory, tokens_of
from ccmdist.planner.mode import why_not
from ccmdist.planner.time import StepTime, step_time
from ccmdist.planner.transformer import Transformer

NUM_GPUS: Final = (8, 64, 512)


@dataclass(frozen=True)
class Scaled:
    """Predicted efficiency of one mode on a number of GPUs; every GPU keeps its micro-batch, one per step.

    Attributes:
        fabric: What lies between the GPUs.
        sharding: Where the frozen weights lie.
        num_gpus: That train together.
        overlapped: Efficiency if sending hides behind computing.
        in_turn: Efficiency if nothing overlaps.
        is_fitting: Whether the mode fits the GPU's memory.
    """

    fabric: str
    sharding: Sharding
    num_gpus: int
    overlapped: float
    in_turn: float
    is_fitting: bool


def scaling(
    config: TrainConfig,
    transformer: Mapping[str, Any],
    gpu: str,
    version: Version = "2509",
    num_text_tokens: int | None = None,
    efficiency: float = EFFICIENCY,
) -> list[Scaled]:
    """Predicted efficiency for every fabric that the GPU can have, every mode and 8, 64 and 512 GPUs.

    Arguments as of :func:`ccmdist.planner.plan.plan`; batches are made to divide.

    Raises:
        ConfigError: If the GPU is unknown.
    """
    model, of = Transformer.from_config(transformer), tokens_of(config, version, num_text_tokens)
    has_nvlink = gpu_named(gpu).nvlink_bytes_per_s > 0
    fabrics = [name for name, fabric in FABRICS.items() if fabric.has_nvlink == has_nvlink]
    alone = _step(config, model, of, "replicated", Machine(gpu, fabrics[0], 1, 1, efficiency))
    return [
        _scaled(config, model, of, sharding, Machine(gpu, name, num, FABRICS[name].gpus_per_node, efficiency), alone)
        for name in fabrics
        for sharding in SHARDINGS
        for num in NUM_GPUS
        if why_not(config, sharding, num, FABRICS[name].gpus_per_node) is None
    ]


def _scaled(
    config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, machine: Machine, alone: StepTime
) -> Scaled:
    step = _step(config, model, of, sharding, machine)
    need = memory(config, model, of, sharding, machine.num_gpus, machine.gpus_per_node)
    return Scaled(
        machine.fabric,
        sharding,
        machine.num_gpus,
        alone.overlapped_s / step.overlapped_s,
        alone.overlapped_s / step.in_turn_s,
        need.fits(gpu_named(machine.gpu).memory_bytes),
    )


def _step(config: TrainConfig, model: Transformer, of: Tokens, sharding: Sharding, machine: Machine) -> StepTime:
    grown = config.model_copy(update={"global_batch_size": config.micro_batch_size * machine.num_gpus})
    return step_time(grown, model, of, sharding, machine)
