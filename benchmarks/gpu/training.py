"""Images per second of training the 20.4 B model on one GPU, by micro-batch and by what is computed again.

    python benchmarks/gpu/training.py [--micro-batch-sizes 1 4 8] [--recompute full selective none] [--repeats 6]

The product's objective and engine (WDLoRA of rank 64, fp32 adapter, AdamW, gradient clipping, DeepSpeed of one rank
with the base whole, the modulation as a table) on random weights made on the GPU and random samples in host memory. A
step is timed from the batch to the updated adapter. MFU counts the useful operations, HFU all of them, both by
`ccmdist.planner` against the GPU's dense bf16 peak. What does not fit is a row that says so. Each way of computing
again has a process of its own.

Without a GPU the same is run on a CPU with two blocks and few tokens: that the script works is all that shows.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import PROBLEM, Case, Result, each, run
from measure.rows import Row
from measure.scale import Scale, device_name, gpu_key
from measure.timing import seconds_of

WARM_UP = 3
TARGETS = {("full", 8): 6.0, ("selective", 8): 9.0}
ANCHOR = "Automodel, LoRA of 7-8 B language models, one H100: 41-43 % MFU (published)"
RECOMPUTES = ("full", "selective", "none")


def measure(case: Case) -> Iterator[Result]:
    """Steps of one way of computing again, in growing micro-batches until one does not fit."""
    import torch
    from measure.random_model import Training, one_rank, scale_of, train_settings

    from ccmdist.planner.time import flops_of

    scale, recompute = scale_of(case), case["recompute"]
    group = one_rank(scale.device)
    device = group.device
    config = train_settings(scale, activation_checkpointing=recompute)
    training, flops = Training(config, group, scale), flops_of(config, scale.transformer, scale.tokens)

    def steps(size: int) -> Result:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        batch = training.objective.batch(size)
        seconds = seconds_of(lambda: training.step(batch), case["repeats"], WARM_UP, device)
        return {
            "seconds": statistics.median(seconds),
            "model_flops": size * flops.model,
            "executed_flops": size * flops.executed,
            "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }

    about = {**case, "device_name": device_name(device)}
    yield from each(about, "micro_batch_size", case["micro_batch_sizes"], steps)


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one micro-batch size."""
    from ccmdist.planner.hardware import gpu_named

    size, recompute = result.get("micro_batch_size", "any"), result["recompute"]
    about = f"micro-batch {size}, recompute {recompute}; {scale.about(result.get('device_name', 'GPU'))}"
    limit = scale.limit(TARGETS[recompute, size]) if (recompute, size) in TARGETS else None
    if problem := result.get(PROBLEM):
        return [Row(f"training images/s, {about}: {problem}", 0.0, None, limit, at_least=True)]
    rows = [Row(f"training images/s, {about}", size / result["seconds"], None, limit, at_least=True)]
    if key := gpu_key(result["device_name"]):
        peak, anchor = gpu_named(key).flops_per_s * result["seconds"], scale.anchor(ANCHOR)
        rows += [
            Row(f"MFU of training in %, {about}", 100 * result["model_flops"] / peak, anchor, at_least=True),
            Row(f"HFU of training in %, {about}", 100 * result["executed_flops"] / peak, at_least=True),
        ]
    if result["peak_bytes"]:
        rows.append(Row(f"peak GB allocated in training, {about}", result["peak_bytes"] / 1e9))
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=None, help="default: 1 4 8; on a CPU 1 2")
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTES, default=RECOMPUTES)
    parser.add_argument("--repeats", type=int, default=None, help="timed steps; default: 6, on a CPU 1")


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    is_gpu = scale.device == "cuda"
    sizes, repeats = arguments.micro_batch_sizes or ([1, 4, 8] if is_gpu else [1, 2]), arguments.repeats
    about = {"repeats": repeats or (6 if is_gpu else 1), "micro_batch_sizes": sizes}
    return [{**about, "recompute": recompute} for recompute in arguments.recompute]


def main() -> int:
    return run(__file__, __doc__, options, cases_of, measure, rows_of)


if __name__ == "__main__":
    sys.exit(main())
