"""What the loop asks of an objective."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from ccmdist.adapters.growth import RankGrowth

Batch = dict[str, Any]


class Objective(Protocol):
    """A thing to learn: its model, its samples, its losses. Methods that run the model are collective."""

    base_digest: str
    """Identity of the frozen weights; a checkpoint belongs to one base."""

    data_digest: str
    """Identity of the training samples and of what was cached of them."""

    growth: RankGrowth | None
    """What decides of lora_ranks that grow, once the model is built; asked by the engine, kept in checkpoints."""

    cut_sets: frozenset[str]
    """Parameter sets of which no rank can hold the whole; see :class:`ccmdist.train.engine.Engine`."""

    def build(self, zero_config: dict[str, Any]) -> torch.nn.Module:
        """The model, partitioned and loaded; afterwards the parameter sets exist."""
        ...

    def parameter_sets(self) -> dict[str, dict[str, torch.nn.Parameter]]:
        """Name of set -> parameter name -> parameter; a step trains some of the sets, the others do not move."""
        ...

    def sets_of_step(self, step: int) -> frozenset[str]:
        """The sets that optimizer step ``step`` trains: a pure function, equal on all ranks."""
        ...

    def batches(self, first_step: int) -> Iterable[Batch]:
        """This rank's micro-batches from ``first_step`` on, without end."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss of a micro-batch; its randomness comes from the samples' positions in the run alone."""
        ...

    def after_step(self) -> None:
        """Called when parameters have changed: after every optimizer step and after loading a state."""
        ...

    def validate(self, model: torch.nn.Module) -> dict[str, float]:
        """Held-out losses by name; the same on every rank."""
        ...

    def describe(self) -> dict[str, float]:
        """Figures about the trained parameters for TensorBoard, such as how far they have moved; equal on all ranks.

        Raises:
            RunError: If they show that nothing is learnt.
        """
        ...

    def images(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Pictures by name, uint8 of shape (H, W) or (H, W, 3), on rank 0: grids of sampled images; none elsewhere."""
        ...

    def first_batch_images(self) -> dict[str, torch.Tensor]:
        """What the first samples of the run look like to the model, as :meth:`images`; local."""
        ...

    def drawn_sigmas(self) -> torch.Tensor:
        """Noise levels drawn by this rank since the last call; empty where there are none."""
        ...
