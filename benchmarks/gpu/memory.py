"""Most memory that training takes on one GPU at micro-batch 1, with the base in bf16 and in 4 bits.

    python benchmarks/gpu/memory.py [--bases bf16 nf4] [--micro-batch-size 1]

The same steps as in training.py, with everything computed again. Told are the most bytes that PyTorch's allocator has
given out, and those that it has reserved, which is what another process could not have; both from the start of the
process, so that making the model counts. CUDA itself takes more: what the GPU reports beyond the reserved bytes.
PYTORCH_CUDA_ALLOC_CONF is expandable_segments:True unless it is set otherwise.

On a CPU it is told by how much the process has grown.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import PROBLEM, Case, Result, each, run
from measure.rows import Row
from measure.scale import Scale, device_name

STEPS = {"cuda": 4, "cpu": 1}
LIMITS_GB = {"bf16": 40.0, "nf4": 24.0}
ANCHORS = {
    "bf16": "musubi-tuner, LoRA at 1024 px, 1 sample: 42 GB (published)",
    "nf4": "musubi-tuner, LoRA at 1024 px, 1 sample, fp8: 30 GB (published)",
}


def measure(case: Case) -> Iterator[Result]:
    """Some steps with one form of the base."""
    from measure.random_model import Training, Watch, one_rank, scale_of, train_settings

    scale = scale_of(case)
    group = one_rank(scale.device)

    def steps(size: int) -> Result:
        watch = Watch(group.device)
        training = Training(train_settings(scale, base=case["base"], micro_batch_size=size), group, scale)
        batch = training.objective.batch(size)
        for _ in range(STEPS[scale.device]):
            training.step(batch)
        return asdict(watch.most())

    about = {**case, "device_name": device_name(group.device)}
    yield from each(about, "micro_batch_size", [case["micro_batch_size"]], steps)


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one form of the base."""
    base = result["base"]
    about = (
        f"base {base}, micro-batch {result['micro_batch_size']}, recompute full; "
        f"{scale.about(result.get('device_name', 'GPU'))}"
    )
    limit, anchor = scale.limit(LIMITS_GB.get(base, float("inf"))), scale.anchor(ANCHORS.get(base))
    if problem := result.get(PROBLEM):
        return [Row(f"peak GB of training, {about}: {problem}", 1e3, anchor, limit)]
    allocated, reserved = result["allocated"] / 1e9, result["reserved"] / 1e9
    rows = [Row(f"peak GB of training, allocated, {about}", allocated, anchor, limit)]
    if scale.device == "cuda":
        rows.append(Row(f"peak GB of training, reserved, {about}", reserved, anchor, limit))
        rows.append(Row(f"GB that CUDA and libraries take beside it, {about}", result["libraries"] / 1e9))
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bases", nargs="+", choices=("bf16", "nf4", "int8"), default=("bf16", "nf4"))
    parser.add_argument("--micro-batch-size", type=int, default=1)


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    return [{"micro_batch_size": arguments.micro_batch_size, "base": base} for base in arguments.bases]


def main() -> int:
    return run(__file__, __doc__, options, cases_of, measure, rows_of)


if __name__ == "__main__":
    sys.exit(main())
