"""WDLoRA costs what LoRA costs: one real-width block of the MMDiT, forward and backward, beside PEFT's LoRA and DoRA.

python benchmarks/wdlora_linear.py [--dim 3072] [--lora-rank 64] [--tokens 1152 256] [--repeats 4]

A QwenImageTransformerBlock (random bf16 weights, 12 adapted linears, activations computed again in the backward pass)
does one optimizer step's forward and backward passes under each adapter in turn. Compared are

    time      process CPU time, median of the ratios of runs one after the other; of a step of 2 micro-batches, as the
              default of 16 samples per step has on 8 ranks, and of a step of one, where the norm weighs most: there the
              limit of 1.05 does not hold on a CPU, whose product of W and A in fp32 is 6 % of a step by itself
    memory    most bytes of tensors alive at once beside weights, adapters, their gradients and inputs, as in every
              micro-batch of a step but its first (measure/memory.py); then the same when gradients are not yet there
    norm      of the rows of W + s B A against fp64, over several sizes of B; PEFT's own method beside ours
    count     evaluations of the norm per linear and optimizer step, with 3 accumulated micro-batches

Anchor is PEFT LoRA as a user of bf16 has it: diffusers' `add_adapter` gives the adapter the base's dtype. Ours keep A,
B and m in fp32. The exit code is 1 if a limit does not hold.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from unittest import mock

import torch
from measure.memory import peak_bytes
from measure.real_block import Inputs, Side, frozen_block, ours, targets_of
from measure.rows import Row, finish
from measure.timing import in_turn, median_ratio
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from ccmdist.adapters.wdlora import RowState
from ccmdist.config.train import LoRASettings, WDLoRASettings

ANCHOR = "PEFT LoRA"
SIZES_OF_B = (1e-4, 1e-3, 5e-3, 2e-2, 1e-1)


def of_peft(block: nn.Module, lora_rank: int, use_dora: bool, dtype: torch.dtype = torch.bfloat16) -> Side:
    """A copy of ``block`` under an adapter of PEFT, of ``dtype``."""
    config = LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=targets_of(block), use_dora=use_dora)
    block = inject_adapter_in_model(config, copy.deepcopy(block))
    for name, parameter in block.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return Side(block)


def sides(dim: int, lora_rank: int) -> dict[str, Side]:
    """All sides, with adapters that have moved away from their start."""
    block = frozen_block(dim)
    found = {
        "WDLoRA": ours(block, WDLoRASettings(lora_rank=lora_rank)),
        ANCHOR: of_peft(block, lora_rank, use_dora=False),
        "LoRA": ours(block, LoRASettings(lora_rank=lora_rank)),
        "PEFT LoRA, adapter in fp32": of_peft(block, lora_rank, use_dora=False, dtype=torch.float32),
        "PEFT DoRA": of_peft(block, lora_rank, use_dora=True),
    }
    for side in found.values():
        for name, parameter in side.block.train().named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)
    return found


def norm_errors(dim: int, lora_rank: int) -> tuple[float, float]:
    """Largest relative error of a row's norm, over all sizes of B: ours, PEFT's."""
    W = (torch.randn(dim, dim) / dim**0.5).bfloat16()
    A = (2 * torch.rand(lora_rank, dim) - 1) / dim**0.5
    squares = W.float().square().sum(1)
    errors: list[tuple[float, float]] = []
    for size in SIZES_OF_B:
        B = size * torch.randn(dim, lora_rank)
        of_ours = RowState.evaluate(W, A, B, squares.sqrt(), squares, 1.0).norm
        A16, B16 = A.bfloat16(), B.bfloat16()
        of_peft = DoraLinearLayer(fan_in_fan_out=False).get_weight_norm(W, B16 @ A16, 1.0)
        errors.append((_error(of_ours, W, A, B), _error(of_peft, W, A16, B16)))
    return max(error for error, _ in errors), max(error for _, error in errors)


def _error(norm: Tensor, W: Tensor, A: Tensor, B: Tensor) -> float:
    exact = (W.double() + B.double() @ A.double()).norm(dim=1)
    return float((norm.double() / exact - 1).abs().max())


def evaluations_per_step(side: Side, inputs: Inputs, accumulation: int = 3) -> float:
    """How often the norm of one linear is evaluated in a step of several micro-batches that are computed again."""
    with mock.patch.object(RowState, "evaluate", side_effect=RowState.evaluate) as evaluate:
        side.step(inputs, accumulation)
    assert side.adapted is not None
    return evaluate.call_count / len(side.adapted.modules)


def measured(arguments: argparse.Namespace) -> list[Row]:
    """All rows."""
    torch.manual_seed(0)
    found, inputs = sides(arguments.dim, arguments.lora_rank), Inputs.of(arguments.dim, tuple(arguments.tokens))
    peaks = {name: _peaks(side, inputs) for name, side in found.items()}
    pair = {name: found[name] for name in ("WDLoRA", ANCHOR)}
    accumulated = _ratios(pair, inputs, 2, max(arguments.repeats // 2, 1))["WDLoRA"]
    alone = _ratios(pair, inputs, 1, arguments.repeats)["WDLoRA"]
    del found["WDLoRA"]
    ratios = _ratios(found, inputs, 1, max(arguments.repeats // 2, 1))
    fp32 = "PEFT LoRA, adapter in fp32"
    dora = ratios["PEFT DoRA"]
    rows = [
        Row("WDLoRA / PEFT LoRA, CPU time, 2 micro-batches per step (anchor: PEFT DoRA)", accumulated, dora, 1.05, 1),
        Row("WDLoRA / PEFT LoRA, CPU time, 1 micro-batch per step (anchor: PEFT DoRA)", alone, dora, 1.05, 1),
        Row("WDLoRA / PEFT LoRA, peak transient memory (anchor: DoRA)", *_by(peaks, 0, "WDLoRA", "PEFT DoRA"), 1.06, 1),
        Row("the same, gradients of adapters counted", *_by(peaks, 1, "WDLoRA", "PEFT DoRA"), 1.06, 1),
        Row("PEFT LoRA, peak transient MB", peaks[ANCHOR][0]),
        Row("LoRA of ours / PEFT LoRA, CPU time (anchor: PEFT LoRA in fp32)", ratios["LoRA"], ratios[fp32]),
        Row(
            "LoRA of ours / PEFT LoRA, peak transient memory (anchor: PEFT LoRA in fp32)", *_by(peaks, 0, "LoRA", fp32)
        ),
    ]
    ours, peft = norm_errors(arguments.dim, arguments.lora_rank)
    rows.append(Row("relative error of the norm against fp64, bf16 weights (anchor: PEFT DoRA)", ours, peft, 2e-5))
    count = evaluations_per_step(pair["WDLoRA"], Inputs.of(arguments.dim, (8, 8)))
    return [*rows, Row("norm evaluations per linear and optimizer step", count, 6.0, 1.0)]


def _ratios(found: dict[str, Side], inputs: Inputs, accumulation: int, repeats: int) -> dict[str, float]:
    """CPU time of a step of each side as a multiple of the anchor's."""
    runs: dict[str, Callable[[], object]] = {
        name: (lambda side=side: side.whole_step(inputs, accumulation)) for name, side in found.items()
    }
    seconds = in_turn(runs, repeats, warm_up=0)
    return {name: median_ratio(seconds[name], seconds[ANCHOR]) for name in runs if name != ANCHOR}


def _by(peaks: dict[str, tuple[float, float]], which: int, ours: str, theirs: str) -> tuple[float, float]:
    """Two peaks as multiples of that of the anchor."""
    return peaks[ours][which] / peaks[ANCHOR][which], peaks[theirs][which] / peaks[ANCHOR][which]


def _peaks(side: Side, inputs: Inputs) -> tuple[float, float]:
    """Peak of a run in MB beside gradients that are there, and of one that makes them."""
    resident = [*side.block.parameters(), *side.block.buffers(), *inputs.tensors]
    making = peak_bytes(lambda: side.step(inputs), resident)
    gradients = [parameter.grad for parameter in side.block.parameters() if parameter.grad is not None]
    return peak_bytes(lambda: side.step(inputs), resident + gradients) / 1e6, making / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--lora-rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, nargs=2, default=(1152, 256), metavar=("IMAGE", "TEXT"))
    parser.add_argument("--repeats", type=int, default=4)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    return finish("wdlora_linear", measured(arguments))


if __name__ == "__main__":
    sys.exit(main())
