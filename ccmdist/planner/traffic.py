"""Bytes that each GPU receives in an optimizer step, by where the frozen weights lie.

A gather of W bytes over N ranks brings each rank W (N - 1) / N: the rest is its own.
"""

from dataclasses import dataclass
from typing import Final

from ccmdist.config.train import TrainConfig
from ccmdist.planner.memory import Sharding, cut_bytes, num_trained
from ccmdist.planner.transformer import Transformer

GATHERS: Final = 2
"""Of each frozen weight in a micro-step: for the forward pass and, computed again or not, for the backward pass."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a GPU receives.

    Attributes:
        weights_per_micro_step: Frozen weights of other ranks.
        gradients_per_micro_step: Of the adapter: ZeRO-3 brings each rank the sum of its part.
        adapter_per_step: The adapter, or both of two, once after each update.
        num_micro_steps: In an optimizer step.
        num_weight_ranks: Over which the frozen weights are cut; 1 if they are whole everywhere.
    """

    weights_per_micro_step: float
    gradients_per_micro_step: float
    adapter_per_step: float
    num_micro_steps: int
    num_weight_ranks: int

    @property
    def per_step(self) -> float:
        """All of an optimizer step."""
        return (
            self.num_micro_steps * (self.weights_per_micro_step + self.gradients_per_micro_step) + self.adapter_per_step
        )


def traffic(
    config: TrainConfig, model: Transformer, sharding: Sharding, num_ranks: int, ranks_per_node: int
) -> Traffic:
    """What each GPU receives; arguments as of :func:`ccmdist.planner.memory.memory`."""
    cut_over = {"replicated": 1, "zero3_hpz": min(ranks_per_node, num_ranks), "zero3": num_ranks}[sharding]
    adapter = 4.0 * num_trained(config, model) * _from_others(num_ranks)
    return Traffic(
        weights_per_micro_step=GATHERS * cut_bytes(config, model) * _from_others(cut_over),
        gradients_per_micro_step=adapter / config.objective.num_adapters,  # of the one that the step trains
        adapter_per_step=adapter,
        num_micro_steps=config.global_batch_size // (config.micro_batch_size * num_ranks),
        num_weight_ranks=cut_over,
    )


def _from_others(num_ranks: int) -> float:
    return (num_ranks - 1) / num_ranks
