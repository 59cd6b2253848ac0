"""What `ccmdist model plan` predicts for training on one GPU, against what is measured: step time and peak memory.

    python benchmarks/gpu/planner.py [--configurations full:1 full:8 selective:4] [--repeats 6]

The same steps as in training.py; a configuration is what is computed again and the micro-batch. Measured memory is the
most that PyTorch has given out, and what CUDA and its libraries take beside PyTorch's reserve. A CPU's time is compared
with the plan for an H200, which says nothing but that the script works; its memory, by which the process has grown,
with the plan without CUDA's.
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
TIME_LIMIT, MEMORY_LIMIT = 0.20, 0.10
FABRIC = "pcie-1x100g"
"""Between GPUs, of which there is one."""


def measure(case: Case) -> Iterator[Result]:
    """One configuration: seconds and bytes, measured and planned."""
    from measure.random_model import Training, Watch, one_rank, scale_of, train_settings

    from ccmdist.planner.hardware import Machine
    from ccmdist.planner.memory import memory
    from ccmdist.planner.time import step_time

    scale = scale_of(case)
    group = one_rank(scale.device)
    name = device_name(group.device)
    machine = Machine(gpu_key(name) or "h200", FABRIC, 1, 1)
    model, tokens = scale.transformer, scale.tokens

    def steps(size: int) -> Result:
        config = train_settings(scale, activation_checkpointing=case["recompute"], micro_batch_size=size)
        watch = Watch(group.device)
        training = Training(config, group, scale)
        batch = training.objective.batch(size)
        seconds = seconds_of(lambda: training.step(batch), case["repeats"], WARM_UP, group.device)
        used, planned = watch.most(), memory(config, model, tokens, "replicated", 1, 1)
        return {
            "seconds": statistics.median(seconds),
            "bytes": used.allocated + used.libraries,
            "planned_seconds": step_time(config, model, tokens, "replicated", machine).overlapped_s,
            "planned_bytes": planned.total - (0 if scale.device == "cuda" else planned.libraries),
        }

    yield from each({**case, "device_name": name}, "micro_batch_size", [case["micro_batch_size"]], steps)


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one configuration."""
    about = f"recompute {result['recompute']}, micro-batch {result['micro_batch_size']}"
    about += f"; {scale.about(result.get('device_name', 'GPU'))}"
    if problem := result.get(PROBLEM):
        return [Row(f"planned against measured, {about}: {problem}", 1e3, None, scale.limit(TIME_LIMIT))]
    off = {name: abs(result[f"planned_{name}"] / result[name] - 1) for name in ("seconds", "bytes")}
    planned_for = "" if scale.device == "cuda" else "for an H200 "
    time_limit = scale.limit(TIME_LIMIT) if gpu_key(result["device_name"]) else None
    seconds, num_bytes = ((result[f"planned_{name}"], result[name]) for name in ("seconds", "bytes"))
    return [
        Row(f"step time, |planned {planned_for}/ measured - 1|, {about}", off["seconds"], None, time_limit),
        Row(f"s per step, planned {planned_for}against measured, {about}", *seconds),
        Row(f"peak memory, |planned / measured - 1|, {about}", off["bytes"], None, scale.limit(MEMORY_LIMIT)),
        Row(f"peak GB, planned against measured, {about}", *(value / 1e9 for value in num_bytes)),
    ]


def configuration(text: str) -> tuple[str, int]:
    """Such as full:8."""
    recompute, _, size = text.partition(":")
    if recompute not in ("full", "selective", "none") or not size.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not like full:8")
    return recompute, int(size)


def options(parser: argparse.ArgumentParser) -> None:
    told = "default: full:1 full:8 selective:4; on a CPU full:1"
    parser.add_argument("--configurations", type=configuration, nargs="+", default=None, help=told)
    parser.add_argument("--repeats", type=int, default=None, help="timed steps; default: 6, on a CPU 1")


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    is_gpu = scale.device == "cuda"
    given = arguments.configurations or ([("full", 1), ("full", 8), ("selective", 4)] if is_gpu else [("full", 1)])
    repeats = arguments.repeats or (6 if is_gpu else 1)
    return [{"repeats": repeats, "recompute": recompute, "micro_batch_size": size} for recompute, size in given]


def main() -> int:
    return run(__file__, __doc__, options, cases_of, measure, rows_of)


if __name__ == "__main__":
    sys.exit(main())
