"""What it costs that ranks grow, beside a step of training: looking at gradients, the test, the largest rank.

    python benchmarks/growth_cost.py [--dim 3072] [--lora-rank 32] [--tokens 1152 256] [--repeats 3]

One QwenImageTransformerBlock (random bf16 weights, 12 linears with LoRA, activations computed again) does the forward
and backward passes of an optimizer step of one 384 px image. Beside that, in the same run and for the same linears:

    looking   at the gradients of a step: squared norms of probes and of active ranks, the inactive ones set to zero
    test      ratios, and the ranks that become active; here every linear grows, which is as much as there can be
    update    of AdamW in which every rank counts its own steps, beyond that of the plain one
    rank      the step where all layers compute at --lora-rank, as they always do, by one of layers of rank 1 and 4

CPU time of one thread, median of the ratios of runs one after the other. The limit is that of the issue: a test costs
at most 2 % of a step, and so does what comes with every step. The sums over ranks are not measured: 16 bytes for each
linear and step.
"""

import argparse
import statistics
import sys
import warnings
from functools import partial

import torch
from measure.real_block import Inputs, Side, frozen_block, ours
from measure.rows import Row, finish
from measure.timing import in_turn, median_ratio

from ccmdist.adapters.growth import Piece, RankGrowth
from ccmdist.config.train import GrowthSettings, LoRASettings, OptimSettings
from ccmdist.train.optim import optimizer

LIMIT = 0.02
LESS = (1, 4)
"""Ranks without room to grow, with which the largest is compared."""
ALWAYS = 1 + 1e-9
"""A ratio that every linear reaches in every test."""


class Growing:
    """The trained parameters of a block in one flat tensor, as the engine has them, and what grows there."""

    def __init__(self, side: Side, lora_rank: int) -> None:
        """Take over what the side has trained; its gradients have to be there."""
        assert side.adapted is not None
        parameters, offset, pieces = side.adapted.parameters, 0, {}
        for name, parameter in parameters.items():
            pieces[name] = Piece(offset, parameter.numel(), 0, tuple(parameter.shape))
            offset += parameter.numel()
        self.flat = torch.cat([parameter.detach().flatten() for parameter in parameters.values()])
        self.found = torch.cat([parameter.grad.flatten() for parameter in parameters.values()])
        self.gradient, self.num_steps = self.found.clone(), 0
        settings = GrowthSettings(fisher_ratio=ALWAYS, every_steps=1)
        self.growth = RankGrowth(list(side.adapted.modules), lora_rank, settings)
        self.growth.place(pieces, self.flat)
        self.plain, self.own_steps = (self._adamw(grows) for grows in (False, True))

    def _adamw(self, grows: bool) -> torch.optim.Optimizer:
        flat = self.flat.clone()
        flat.grad = self.gradient
        adamw = optimizer({"adapter": [flat]}, OptimSettings(), grows)
        adamw.begin(flat)
        if grows:
            adamw.set_births(flat, self.growth.born)
        return adamw

    def restore(self) -> None:
        """The gradient as a backward pass has left it."""
        self.gradient.copy_(self.found)

    def look(self) -> None:
        """What the engine does in every step."""
        self.growth.add(self.growth.look(self.gradient), list)

    def test(self) -> None:
        """What it does in every t-th step."""
        self.num_steps += 1
        assert len(self.growth.grow(self.num_steps)) == len(self.growth.births), "not all have grown"


def measured(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    block, inputs = frozen_block(arguments.dim), Inputs.of(arguments.dim, tuple(arguments.tokens))
    largest, steps = arguments.lora_rank, {}
    for lora_rank in (largest, *LESS):
        side = ours(block, LoRASettings(lora_rank=lora_rank))
        side.block.train()
        steps[f"step at {lora_rank}"] = partial(side.whole_step, inputs, 1)
        if lora_rank == largest:
            side.step(inputs)
            growing = Growing(side, largest)
    updates = {"plain": growing.plain.step, "own steps": growing.own_steps.step}
    runs = {"restore": growing.restore, "look": growing.look, "test": growing.test, **updates, **steps}
    return rows_of(in_turn(runs, arguments.repeats), largest)


def rows_of(seconds: dict[str, list[float]], largest: int) -> list[Row]:
    """Shares of a step, and what the largest rank costs."""
    step = seconds[f"step at {largest}"]
    more = [own - plain for own, plain in zip(seconds["own steps"], seconds["plain"], strict=True)]
    always = [look + extra for look, extra in zip(seconds["look"], more, strict=True)]
    return [
        Row("a test in which all linears grow / step, CPU time", median_ratio(seconds["test"], step), None, LIMIT),
        Row("looking at the gradients of a step / step, CPU time", median_ratio(seconds["look"], step), None, LIMIT),
        Row("update with steps of each rank, beyond plain AdamW / step, CPU time", median_ratio(more, step)),
        Row("what comes with every step, both together / step, CPU time", median_ratio(always, step), None, LIMIT),
        *(
            Row(
                f"step at rank {largest} / step at rank {less}, CPU time",
                median_ratio(step, seconds[f"step at {less}"]),
            )
            for less in LESS
        ),
        Row(f"CPU seconds of the step at rank {largest}", statistics.median(step)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--lora-rank", type=int, default=32, help="the largest, as in configs/train/selora.yaml")
    parser.add_argument("--tokens", type=int, nargs=2, default=(1152, 256), metavar=("IMAGE", "TEXT"))
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return finish("growth_cost", measured(arguments))


if __name__ == "__main__":
    sys.exit(main())
