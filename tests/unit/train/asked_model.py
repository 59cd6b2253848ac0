"""What an objective needs of its surroundings: a process group of one rank, and something in the place of the model."""

import torch

from ccmdist.cluster.ranks import Ranks


class OneRank:
    """What the objective asks of its process group."""

    ranks = Ranks(0, 0, 1)
    device = torch.device("cpu")

    def total(self, values):
        return list(values)


class Asked(torch.nn.Module):
    """Stands for the model: writes down what it is asked."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, **named):
        self.calls.append(named)
        return (torch.zeros_like(named["hidden_states"]) + named["hidden_states"] * 0,)
