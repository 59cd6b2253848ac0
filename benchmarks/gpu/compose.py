"""What WDLoRA does element by element, as PyTorch runs it and compiled: does a fused kernel pay on this device?

    python benchmarks/gpu/compose.py [--batch-size 4] [--repeats 20]

Of each width of output in a block, for all tokens of a micro-batch at 384 px, bf16: the forward pass scales the base's
output, y <- g y + (1 - g) b; the backward pass makes g dy and the gradient of m. Compiled is the same arithmetic by
`torch.compile`. Where a whole step would be at least 1 % faster, it pays; the product runs what is not compiled until
that was measured. On a CPU the sizes are tiny, and show only that the script works.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measure.rows import Row, finish
from measure.scale import device_name
from measure.timing import seconds_of
from torch import Tensor

from ccmdist.adapters import wdlora
from ccmdist.adapters.wdlora import RowState

NUM_OUTPUTS = {"d": 10, "4 d": 2}
"""Linears of a block, image and text, with an output of this width."""
WIDTHS = {"d": 1, "4 d": 4}
GPU_SHAPE, CPU_SHAPE = (1408, 3072), (44, 96)
WARM_UP = 3


def scaled(y_TO: Tensor, bias_O: Tensor, gain_O: Tensor) -> Tensor:
    """What the forward pass does to the base's output."""
    return torch.addcmul(bias_O, y_TO, gain_O, out=y_TO)


def scaled_anew(y_TO: Tensor, bias_O: Tensor, gain_O: Tensor) -> Tensor:
    """The same without an argument that a compiler would have to change."""
    return torch.addcmul(bias_O, y_TO, gain_O).to(y_TO.dtype)


def through_gain(dy_TO: Tensor, y_TO: Tensor, b_O: Tensor, gain_O: Tensor) -> tuple[Tensor, Tensor]:
    """What the backward pass does before its products of matrices, in one expression."""
    dm_O = (dy_TO.float() * (y_TO.float() - b_O.float())).sum(0)
    return (dy_TO * gain_O).to(dy_TO.dtype), dm_O


def cases(num_tokens: int, width: int, device: torch.device) -> Iterator[tuple[str, list[Callable[[], object]]]]:
    """Each pass as it is, and compiled."""
    y_TO, dy_TO = (torch.randn(num_tokens, width, device=device).bfloat16() for _ in range(2))
    b_O = torch.randn(width, device=device).bfloat16()
    rows = row_state(width, device)
    bias_O = (1 - rows.gain) * b_O
    compiled, compiled_back = torch.compile(scaled_anew), torch.compile(through_gain)
    yield "forward", [lambda: scaled(y_TO, bias_O, rows.gain), lambda: compiled(y_TO, bias_O, rows.gain)]
    dm_O = torch.zeros_like(rows.magnitude)
    yield (
        "backward",
        [
            lambda: wdlora._through_gain(dy_TO, y_TO, b_O, rows, dm_O),
            lambda: compiled_back(dy_TO, y_TO, b_O, rows.gain),
        ],
    )


def row_state(width: int, device: torch.device) -> RowState:
    """Rows whose gains are near 1."""
    W = torch.randn(width, 8, device=device).bfloat16()
    squares = W.float().square().sum(1)
    A, B = torch.zeros(2, 8, device=device), torch.zeros(width, 2, device=device)
    return RowState.evaluate(W, A, B, 1.01 * squares.sqrt(), squares, 1.0)


def rows_of(batch_size: int, repeats: int, device: torch.device) -> Iterator[Row]:
    """Milliseconds of both ways, and what a block would gain."""
    tokens, dim = GPU_SHAPE if device.type == "cuda" else CPU_SHAPE
    gain = 0.0
    for name, factor in WIDTHS.items():
        for what, ways in cases(batch_size * tokens, factor * dim, device):
            eager, fused = (1e3 * statistics.median(seconds_of(way, repeats, WARM_UP, device)) for way in ways)
            shape = f"({batch_size * tokens}, {factor * dim})"
            yield Row(
                f"{what}, output of {name}: ms compiled (anchor: as it is); {shape}, {device_name(device)}",
                fused,
                eager,
            )
            # Image and text linears share the tokens, so a pair is one pass over all. Recompute doubles the forward.
            gain += NUM_OUTPUTS[name] / 2 * (2 if what == "forward" else 1) * (eager - fused)
    yield Row(f"a block's gain by compiling, ms per micro-batch of {batch_size}; {device_name(device)}", gain)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=20)
    arguments, _ = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = "gpu_compose" if device.type == "cuda" else "gpu_compose_cpu"
    return finish(name, list(rows_of(arguments.batch_size, arguments.repeats, device)))


if __name__ == "__main__":
    sys.exit(main())
