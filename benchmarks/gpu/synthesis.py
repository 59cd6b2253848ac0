"""Images per hour of synthesis on one GPU: 40 steps with guidance, the adapter merged, decoding included.

    python benchmarks/gpu/synthesis.py [--batch-sizes 8 4 16] [--denoise-steps 40] [--batches 2] [--compile]

The product's ImageSampler draws whole batches, from embeddings and latents in host memory to grey images there:
both branches of guidance in one pass, the modulation as a table on the device, the VAE of the published size. Weights
are random; a merged adapter changes values, not work. Before the timed batches a few steps and a decoding warm up.
The first batch size is held to the target, with --batches batches; of the others one batch is timed. MFU counts two
forward passes per step and image, by `ccmdist.planner`.
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

TARGET_SIZE, TARGET_STEPS = 8, 40
TARGET_PER_HOUR, GOAL_PER_HOUR = 1200.0, 1300.0
ANCHOR = "vllm-omni, Qwen-Image-Edit on one H200 at 1024 px, no guidance: 59 % MFU (published)"


def measure(case: Case) -> Iterator[Result]:
    """Whole batches of each size."""
    import torch
    from measure.random_model import scale_of
    from measure.random_sampler import RandomSampler

    from ccmdist.planner.flops import forward_flops

    scale, device = scale_of(case), torch.device(case["device"])
    sampler = RandomSampler(scale, device, case["denoise_steps"], case["compile"])
    flops = 2 * case["denoise_steps"] * forward_flops(scale.transformer, scale.tokens, is_tabled=True)

    def batches(size: int) -> Result:
        sampler.warm_up(size)
        num_batches = case["batches"] if size == case["batch_sizes"][0] else 1
        seconds = seconds_of(lambda: sampler.draw(sampler.requests(size)), num_batches, 0, device)
        return {"seconds": statistics.mean(seconds), "num_batches": num_batches, "flops": size * flops}

    yield from each({**case, "device_name": device_name(device)}, "batch_size", case["batch_sizes"], batches)


def rows_of(result: Result, scale: Scale) -> list[Row]:
    """Rows of one batch size."""
    from ccmdist.planner.hardware import gpu_named

    size, steps = result.get("batch_size", "any"), result["denoise_steps"]
    about = f"batch {size}, {steps} steps with guidance{', compiled' if result['compile'] else ''}"
    about += f"; {scale.about(result.get('device_name', 'GPU'))}"
    is_target = (size, steps) == (TARGET_SIZE, TARGET_STEPS)
    limit = scale.limit(TARGET_PER_HOUR) if is_target else None
    goal = scale.limit(GOAL_PER_HOUR) if is_target else None
    if problem := result.get(PROBLEM):
        return [Row(f"synthesis images/h, {about}: {problem}", 0.0, None, limit, goal, at_least=True)]
    claim = f"synthesis images/h, {result['num_batches']} whole batches, {about}"
    rows = [Row(claim, 3600 * size / result["seconds"], None, limit, goal, at_least=True)]
    if key := gpu_key(result["device_name"]):
        mfu = 100 * result["flops"] / (gpu_named(key).flops_per_s * result["seconds"])
        rows.append(Row(f"MFU of synthesis in %, {about}", mfu, scale.anchor(ANCHOR), at_least=True))
    return rows


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, help="default: 8 4 16; on a CPU 2")
    parser.add_argument("--denoise-steps", type=int, default=None, help="default: 40; on a CPU 2")
    parser.add_argument("--batches", type=int, default=None, help="of the first size; default: 2, on a CPU 1")
    parser.add_argument("--compile", action="store_true", help="compile_blocks of the settings")


def cases_of(arguments: argparse.Namespace, scale: Scale) -> list[Case]:
    is_gpu = scale.device == "cuda"
    case = {
        "batch_sizes": arguments.batch_sizes or ([TARGET_SIZE, 4, 16] if is_gpu else [2]),
        "denoise_steps": arguments.denoise_steps or (TARGET_STEPS if is_gpu else 2),
        "batches": arguments.batches or (2 if is_gpu else 1),
        "compile": arguments.compile,
    }
    return [case]


def main() -> int:
    compiled = lambda arguments: "_compiled" if arguments.compile else ""  # noqa: E731
    return run(__file__, __doc__, options, cases_of, measure, rows_of, compiled)


if __name__ == "__main__":
    sys.exit(main())
