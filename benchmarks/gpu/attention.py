"""Attention kernels that this machine has, at the shapes of the model; and whether the chosen one is the fastest.

    python benchmarks/gpu/attention.py [--batch-sizes 1 8] [--repeats 10]

Queries, keys and values are (b, 1408, 24, 128) in bf16: 384 px. Every backend of diffusers that runs without padding
is called as the model calls it, forward alone and forward with backward; one that cannot run here has no row.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import PROBLEM, Case, Result, each, run
from measure.rows import Row
from measure.scale import Scale, device_name
from measure.timing import seconds_of

BACKENDS = ("flash", "_flash_3", "_native_flash", "_native_cudnn", "_native_efficient", "native", "_native_math")
CALLS = {"cuda": 20, "cpu": 1}
"""Calls that are timed at once: one takes less time than the host needs to look at the clock."""
WARM_UP = 3


def measure(case: Case) -> Iterator[Result]:
    """Seconds of a call by batch size and backend."""
    import torch
    from measure.random_model import chosen_attention, scale_of

    scale, device = scale_of(case), torch.device(case["device"])
    about = {**case, "device_name": device_name(device), "chosen": chosen_attention(scale, device)}

    def calls(size: int) -> Result:
        shape = (size, scale.tokens.total, scale.heads, 128)
        qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        found = {backend: _seconds(qkv, backend, case["repeats"]) for backend in BACKENDS}
        return {"seconds": {backend: seconds for backend, seconds in found.items() if seconds}}

    yield from each(about, "batch_size", case["batch_sizes"], calls)


def _seconds(qkv: list, backend: str, repeats: int) -> dict[str, float]:
    """Of a forward pass, and of one with its backward pass; empty if the backend cannot run here."""
    import torch
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    device = qkv[0].device
    gradient = torch.randn_like(qkv[0])

    def forward() -> torch.Tensor:
        return dispatch_attention_fn(*qkv, backend=backend)

    def both() -> None:
        for tensor in qkv:
            tensor.grad = None
        forward().backward(gradient)

    def calls(run: Callable[[], object]) -> float:
        count = CALLS[device.type]
        return statistics.median(seconds_of(lambda: [run() for _ in range(count)], repeats, WARM_UP, device)) / count

    try:
        return {"both": calls(both), "forward": calls(torch.no_grad()(forward))}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a backend says that is not there, or not for this device
        sys.stderr.write(f"attention: {backend} cannot run here: {str(error).splitlines()[0][:160]}\n")
        return {}


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one batch size: each backend, against the fastest."""
    size, tokens, where = result.get("batch_size", "any"), scale.tokens.total, result.get("device_name", "GPU")
    shape = f"({size}, {tokens}, {scale.heads}, 128), {where}"
    if problem := result.get(PROBLEM):
        return [Row(f"attention; {shape}: {problem}", 1e3)]
    rows: list[Row] = []
    for what, name, factor in (("forward", "forward", 4.0), ("both", "forward and backward", 14.0)):
        fastest = min(seconds[what] for seconds in result["seconds"].values())
        for backend, seconds in result["seconds"].items():
            rate = factor * size * tokens**2 * scale.transformer.width / seconds[what] / 1e12
            is_chosen = " (chosen)" if backend == result["chosen"] else ""
            claim = f"attention {backend}{is_chosen}, {name}: ms, {rate:.3g} TFLOP/s; {shape}"
            rows.append(Row(claim, 1e3 * seconds[what], 1e3 * fastest))
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, help="default: 1 8; on a CPU 1")
    parser.add_argument("--repeats", type=int, default=None, help="timed groups of calls; default: 10, on a CPU 2")


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    is_gpu = scale.device == "cuda"
    sizes, repeats = arguments.batch_sizes or ([1, 8] if is_gpu else [1]), arguments.repeats
    return [{"batch_sizes": sizes, "repeats": repeats or (10 if is_gpu else 2)}]


def main() -> int:
    return run(__file__, __doc__, options, cases_of, measure, rows_of)


if __name__ == "__main__":
    sys.exit(main())
