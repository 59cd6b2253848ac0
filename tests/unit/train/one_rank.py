"""A run of one rank without DeepSpeed, and a small state for it to save."""

import torch

from ccmdist.cluster.ranks import Ranks
from ccmdist.train.engine import LocalParameter


class OneRank:
    """What a checkpoint store asks of its process group."""

    ranks = Ranks(0, 0, 1)

    def from_first(self, value):
        return value

    def gathered(self, value):
        return [value]

    def barrier(self):
        pass


def state(step):
    """A parameter all of whose elements are the number of the step."""
    values = {quantity: torch.full((6,), float(step)) for quantity in ("weight", "exp_avg", "exp_avg_sq")}
    return {"layer.weight": LocalParameter((2, 3), 0, values)}


def holds(checkpoint, step):
    """Whether ``checkpoint`` is the one that was made of ``state(step)``."""
    return checkpoint.step == step and torch.equal(
        checkpoint.whole("layer.weight", "weight"), torch.full((2, 3), float(step))
    )
