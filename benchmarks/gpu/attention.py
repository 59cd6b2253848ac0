"""Attention kernels that this machine has, at the shapes of the model; and whether the chosen one is the fastest.

    python benchmarks/gpu/attention.py [--batch-sizes 1 8] [--repeats 10]

Queries, keys and values are (b, 1408, 24, 128) in bf16: 384 px. Every backend of diffusers that runs without padding
is called as the model calls it, forward alone and forward with backward; one that cannot run here has no row.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import DIED, Case, Result, results, serve
from measure.rows import Row, finish
from measure.scale import Scale, device_name, seconds_of

BACKENDS = ("flash", "_flash_3", "_native_flash", "_native_cudnn", "_native_efficient", "native", "_native_math")
CALLS = {"cuda": 20, "cpu": 1}
"""Calls that are timed at once: one takes less time than the host needs to look at the clock."""
WARM_UP = 3


def measure(case: Case) -> Iterator[Result]:
    """Seconds of a call by batch size and backend."""
    import torch
    from measure.random_model import chosen_attention, scale_of

    scale, device = scale_of(case), torch.device(case["device"])
    chosen = chosen_attention(scale, device)
    for size in case["batch_sizes"]:
        result = {**case, "device_name": device_name(device), "batch_size": size, "chosen": chosen}
        shape = (size, scale.tokens.total, scale.heads, 128)
        qkv = [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        for backend in BACKENDS:
            try:
                yield {**result, "backend": backend, **_seconds(qkv, backend, case["repeats"])}
            except Exception as error:  # whatever a backend says that is not there, or not for this device
                sys.stderr.write(f"attention: {backend} cannot run here: {str(error).splitlines()[0][:160]}\n")


def _seconds(qkv: list, backend: str, repeats: int) -> dict[str, float]:
    """Of a forward pass, and of one with its backward pass."""
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

    return {"both": calls(both), "forward": calls(torch.no_grad()(forward))}


def rows_of(found: list[Result], scale: Scale) -> list[Row]:
    """Rows of one batch size: each backend, and the chosen one against the fastest."""
    rows: list[Row] = []
    flops = {"forward": 4.0, "both": 4.0 * 3.5}
    for what, name in (("forward", "forward"), ("both", "forward and backward")):
        fastest = min(result[what] for result in found)
        for result in found:
            size, tokens = result["batch_size"], scale.tokens.total
            rate = flops[what] * size * tokens**2 * scale.transformer.width / result[what] / 1e12
            shape = f"({size}, {tokens}, {scale.heads}, 128), {result['device_name']}"
            is_chosen = " (chosen)" if result["backend"] == result["chosen"] else ""
            claim = f"attention {result['backend']}{is_chosen}, {name}: ms, {rate:.3g} TFLOP/s; {shape}"
            rows.append(Row(claim, 1e3 * result[what], 1e3 * fastest))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Scale.add_to(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, help="default: 1 8; on a CPU 1")
    parser.add_argument("--repeats", type=int, default=None, help="timed groups of calls; default: 10, on a CPU 2")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return serve(arguments.case, measure)
    scale = Scale.of(arguments)
    is_gpu = scale.device == "cuda"
    sizes, repeats = arguments.batch_sizes or ([1, 8] if is_gpu else [1]), arguments.repeats or (10 if is_gpu else 2)
    case = {**asdict(scale), "batch_sizes": sizes, "repeats": repeats}
    found = list(results(__file__, [case], measure, is_apart=is_gpu))
    by_size = [[one for one in found if one.get("batch_size") == size] for size in sizes]
    rows = [row for of_size in by_size if of_size for row in rows_of(of_size, scale)]
    finish(scale.file("attention"), rows)
    return int(not rows or any(DIED in one for one in found))


if __name__ == "__main__":
    sys.exit(main())
