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
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from measure.cases import DIED, PROBLEM, Case, Result, results, serve
from measure.rows import Row, finish, write
from measure.scale import Scale, device_name, gpu_key, seconds_of

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
    for index, size in enumerate(case["batch_sizes"]):
        result = {**case, "device_name": device_name(device), "batch_size": size}
        try:
            sampler.warm_up(size)
            num_batches = case["batches"] if index == 0 else 1
            seconds = seconds_of(lambda s=size: sampler.draw(sampler.requests(s)), num_batches, 0, device)
        except torch.OutOfMemoryError:
            yield {**result, PROBLEM: "out of memory"}
            return
        flops = 2 * case["denoise_steps"] * size * forward_flops(scale.transformer, scale.tokens, is_tabled=True)
        yield {**result, "seconds": statistics.mean(seconds), "num_batches": num_batches, "flops": flops}


def rows_of(result: Result, scale: Scale, is_target: bool) -> list[Row]:
    """Rows of one batch size."""
    from ccmdist.planner.hardware import gpu_named

    size, steps = result.get("batch_size", "any"), result["denoise_steps"]
    about = f"batch {size}, {steps} steps with guidance{', compiled' if result['compile'] else ''}"
    about += f"; {scale.about(result.get('device_name', 'GPU'))}"
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Scale.add_to(parser)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=None, help="default: 8 4 16; on a CPU 2")
    parser.add_argument("--denoise-steps", type=int, default=None, help="default: 40; on a CPU 2")
    parser.add_argument("--batches", type=int, default=None, help="of the first size; default: 2, on a CPU 1")
    parser.add_argument("--compile", action="store_true", help="compile_blocks of the settings")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        return serve(arguments.case, measure)
    scale = Scale.of(arguments)
    is_gpu = scale.device == "cuda"
    case = {
        **asdict(scale),
        "batch_sizes": arguments.batch_sizes or ([8, 4, 16] if is_gpu else [2]),
        "denoise_steps": arguments.denoise_steps or (40 if is_gpu else 2),
        "batches": arguments.batches or (2 if is_gpu else 1),
        "compile": arguments.compile,
    }
    is_target = case["batch_sizes"][0] == 8 and case["denoise_steps"] == 40
    name = scale.file("synthesis") + ("_compiled" if arguments.compile else "")
    rows: list[Row] = []
    has_died = False
    for result in results(__file__, [case], measure, is_apart=is_gpu):
        rows += rows_of(result, scale, is_target and not rows)
        has_died |= DIED in result
        write(name, rows)
    return finish(name, rows) or int(has_died)


if __name__ == "__main__":
    sys.exit(main())
