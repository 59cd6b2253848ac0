"""Time of a training step with WDLoRA against one with LoRA of the same rank, on one GPU.

    python benchmarks/gpu/adapter_ratio.py [--micro-batch-sizes 1 4] [--repeats 8]

Both are the product's objective and engine, as in training.py, with everything computed again; they share the frozen
weights and take steps in turn in one process. The ratio is the median of those of steps that follow each other.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import PROBLEM, Case, Result, each, run
from measure.rows import Row
from measure.scale import Scale, device_name
from measure.timing import in_turn, median_ratio

WARM_UP = 3
LIMITS = {1: 1.10, 4: 1.05}
PUBLISHED = "PEFT DoRA / LoRA, FLUX.2-klein-4B, L40S: 1.93 (published)"


def measure(case: Case) -> Iterator[Result]:
    """Steps of both adapters in turn, for each micro-batch size."""
    from measure.random_model import Training, one_rank, scale_of, train_settings

    scale = scale_of(case)
    group = one_rank(scale.device)
    wdlora = Training(train_settings(scale), group, scale)
    lora = Training(train_settings(scale, **{"adapter.kind": "lora"}), group, scale, wdlora.objective.weights)

    def steps(size: int) -> Result:
        batch = wdlora.objective.batch(size)
        sides = {"wdlora": lambda: wdlora.step(batch), "lora": lambda: lora.step(batch)}
        return in_turn(sides, case["repeats"], WARM_UP, group.device)

    about = {**case, "device_name": device_name(group.device)}
    yield from each(about, "micro_batch_size", case["micro_batch_sizes"], steps)


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one micro-batch size."""
    size = result.get("micro_batch_size", "any")
    about = f"micro-batch {size}, recompute full; {scale.about(result.get('device_name', 'GPU'))}"
    limit, published = scale.limit(LIMITS.get(size, float("inf"))), scale.anchor(PUBLISHED)
    if problem := result.get(PROBLEM):
        return [Row(f"step time, WDLoRA / LoRA of ours, {about}: {problem}", 1e3, published, limit)]
    ours, anchor = result["wdlora"], result["lora"]
    return [
        Row(f"step time, WDLoRA / LoRA of ours, {about}", median_ratio(ours, anchor), published, limit),
        Row(f"s per step, WDLoRA against LoRA of ours, {about}", statistics.median(ours), statistics.median(anchor)),
    ]


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--micro-batch-sizes", type=int, nargs="+", default=None, help="default: 1 4; on a CPU 1")
    parser.add_argument("--repeats", type=int, default=None, help="timed steps of each; default: 8, on a CPU 2")


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    is_gpu = scale.device == "cuda"
    sizes, repeats = arguments.micro_batch_sizes or ([1, 4] if is_gpu else [1]), arguments.repeats
    return [{"micro_batch_sizes": sizes, "repeats": repeats or (8 if is_gpu else 2)}]


def main() -> int:
    return run(__file__, __doc__, options, cases_of, measure, rows_of)


if __name__ == "__main__":
    sys.exit(main())
