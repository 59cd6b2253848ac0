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

from measure.cases import DIED, PROBLEM, Case, Result, results, serve
from measure.rows import Row, finish, write
from measure.scale import Scale, device_name

STEPS = {"cuda": 4, "cpu": 1}
LIMITS_GB = {"bf16": 40.0, "nf4": 24.0}
ANCHORS = {
    "bf16": "musubi-tuner, LoRA at 1024 px, 1 sample: 42 GB (published)",
    "nf4": "musubi-tuner, LoRA at 1024 px, 1 sample, fp8: 30 GB (published)",
}


def measure(case: Case) -> Iterator[Result]:
    """Some steps with one form of the base."""
    import torch
    from measure.random_model import Training, Watch, one_rank, scale_of, train_settings

    scale, size = scale_of(case), case["micro_batch_size"]
    group = one_rank(scale.device)
    result = {**case, "device_name": device_name(group.device)}
    config = train_settings(scale, base=case["base"], micro_batch_size=size)
    watch = Watch(group.device)
    try:
        training = Training(config, group, scale)
        batch = training.objective.batch(size)
        for _ in range(STEPS[scale.device]):
            training.step(batch)
    except torch.OutOfMemoryError:
        yield {**result, PROBLEM: "out of memory"}
        return
    yield {**result, **asdict(watch.most())}


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Scale.add_to(parser)
    parser.add_argument("--bases", nargs="+", choices=("bf16", "nf4", "int8"), default=("bf16", "nf4"))
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return serve(arguments.case, measure)
    scale = Scale.of(arguments)
    about = {**asdict(scale), "micro_batch_size": arguments.micro_batch_size}
    cases = [{**about, "base": base} for base in arguments.bases]
    rows: list[Row] = []
    has_died = False
    for result in results(__file__, cases, measure, is_apart=scale.device == "cuda"):
        rows += rows_of(result, scale)
        has_died |= DIED in result
        write(scale.file("memory"), rows)
    return finish(scale.file("memory"), rows) or int(has_died)


if __name__ == "__main__":
    sys.exit(main())
