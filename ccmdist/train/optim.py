"""AdamW over named parameter sets, and the learning rate as a pure function of the step."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from ccmdist.config.train import OptimSettings


class SetwiseAdamW(torch.optim.AdamW):
    """AdamW whose step moves only the parameter sets named in ``active``.

    A set is a parameter group with the key "name". Sets that are not active stay bit for bit as they are:
    weights, moments, weight decay and step counters. Under DeepSpeed a zero gradient would still move them by
    their old moments.
    """

    def __init__(self, sets: dict[str, list[torch.nn.Parameter]], settings: OptimSettings) -> None:
        groups = [{"params": parameters, "name": name} for name, parameters in sets.items()]
        super().__init__(groups, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        self.active: frozenset[str] = frozenset(sets)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the active sets."""
        resting = [group for group in self.param_groups if group["name"] not in self.active]
        held = [group["params"] for group in resting]
        for group in resting:
            group["params"] = []
        try:
            return super().step(closure)
        finally:
            for group, parameters in zip(resting, held, strict=True):
                group["params"] = parameters

    def set_lr(self, lr: float) -> None:
        """Use ``lr`` for all sets from now on."""
        for group in self.param_groups:
            group["lr"] = lr


def learning_rate(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Learning rate of optimizer step ``step`` (from 0): linear warm-up, then a cosine down to the minimum.

    A pure function of its arguments, so a resumed run needs no state of a schedule.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(num_steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr_fraction + (1 - settings.min_lr_fraction) * cosine)


@torch.no_grad()
def update_average(average: Iterable[torch.Tensor], current: Iterable[torch.Tensor], decay: float) -> None:
    """Move every average towards its current value: average = decay x average + (1 - decay) x current."""
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value, 1 - decay)
