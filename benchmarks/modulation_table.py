"""The modulation layers as a table: the same output without a third of the weights.

python benchmarks/modulation_table.py [--folder FOLDER] [--repeats 3] [--tokens 24 256]

The transformer of full width and two blocks (2511, random bf16 weights) is built with its layers, and with a table of
the noise levels that are asked for. Compared are

    bf16      elements of the velocity that differ, for batches and for tables made one, three and 64 levels at a time
    fp32      largest difference by the largest value; made at the run's batch size, and at another one
    weights   of the published model that are left, counted without allocating them
    bytes     that loading reads from this folder
    table     its rows, for the noise levels of training and of sampling with 40 steps at 384 px
    time      of one forward at 384 px (1152 image and 256 text tokens, one sample), process CPU time in turn

The exit code is 1 if a limit does not hold.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import measure.quiet  # noqa: F401  before torch
import torch
from measure.full_width import DEFAULT_FOLDER, full_width_folder
from measure.rows import Row, finish
from measure.timing import in_turn, median_ratio

from ccmdist.diffusion import flow
from ccmdist.models import mmdit
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.make import make_transformer
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled, levels, row_length
from ccmdist.models.sizes import SIZES
from ccmdist.models.tabulation import tabulate

GB = 10**9
SHARE_LIMIT, FP32_LIMIT = 0.667, 1e-6
SIGMAS = torch.linspace(0.03, 1, 9)


def table_of(folder: ModelFolder, dtype: torch.dtype, samples_at_once: int) -> ModulationTable:
    levels_N = levels(SIGMAS, dtype)
    rows_NR = torch.empty(len(levels_N), row_length(mmdit.skeleton(folder)), dtype=dtype)
    tabulate(folder, levels_N, rows_NR, samples_at_once)
    return ModulationTable(levels_N, rows_NR)


@torch.no_grad()
def velocity(model: torch.nn.Module, dtype: torch.dtype, sigma_B: torch.Tensor, edge: int, num_text: int):
    source, B = torch.Generator().manual_seed(0), len(sigma_B)
    latents, mask_latents = torch.randn(2, B, edge * edge, 64, generator=source).to(dtype)
    embeds = torch.randn(B, num_text, 3584, generator=source).to(dtype)
    return mmdit.velocity(model, latents, mask_latents, embeds, sigma_B, (edge, edge), (edge, edge))


def equality(folder: ModelFolder, dtype: torch.dtype, chunks: tuple[int, ...]) -> Iterator[Row]:
    """Differences at a few tokens: what a table changes does not depend on their number."""
    plain = mmdit.build(folder, dtype, None)
    batches = [SIGMAS[[4]], SIGMAS[[0, 5, 8]]]
    expected = [velocity(plain, dtype, sigma_B, 4, 8) for sigma_B in batches]
    del plain
    for chunk in chunks:
        tabled = mmdit.build(folder, dtype, None, table=table_of(folder, dtype, chunk))
        for wanted, sigma_B in zip(expected, batches, strict=True):
            found, about = velocity(tabled, dtype, sigma_B, 4, 8), f"table made {chunk} at a time, batch {len(sigma_B)}"
            if dtype == torch.bfloat16:
                count, total = int((found != wanted).sum()), found.numel()
                yield Row(f"bf16, {about}: elements that differ, of {total}", count, 0, 0)
            else:
                limit = 0.0 if chunk == len(sigma_B) else FP32_LIMIT
                difference = float((found - wanted).abs().max() / wanted.abs().max())
                yield Row(f"fp32, {about}: largest difference by largest value", difference, limit=limit)


def sizes(folder: ModelFolder) -> Iterator[Row]:
    with torch.device("meta"):
        model = make_transformer(SIZES["full"], "2511")
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    kept = sum(count for name, count in weights.items() if not is_tabled(name))
    whole = sum(weights.values())
    yield Row("published model: weights left, 10^9", kept / GB, whole / GB, SHARE_LIMIT * whole / GB)
    yield Row("published model: share of weights left", kept / whole, 1.0, SHARE_LIMIT)
    shift = flow.resolution_shift(24 * 24, folder.noise_schedule())
    grid = torch.cat([flow.training_sigmas(shift), flow.sampling_sigmas(40, shift, folder.noise_schedule())])
    for about, sigmas in (("training and 40 steps", grid), ("40 steps", grid[1000:])):
        num_levels = len(levels(sigmas, torch.bfloat16))
        table_gb, replaced = num_levels * row_length(model) * 2 / GB, 2 * (whole - kept) / GB
        yield Row(f"published model: table of {about}, bf16, {num_levels} levels, GB", table_gb, replaced)


def reading(folder: ModelFolder) -> Iterator[Row]:
    """Bytes and time of loading, for the two blocks."""
    read = {}
    for is_plain in (True, False):
        files = {n: f for n, f in folder.weight_files("transformer").items() if is_plain or not is_tabled(n)}
        model = mmdit.skeleton(folder)
        if not is_plain:
            ModulationTable(torch.zeros(1), torch.empty(1, row_length(model), device="meta")).install(model)
        model = torch.nn.Module.to(model, torch.bfloat16).to_empty(device="cpu")
        read[is_plain] = load_weights(model, files) / GB
    yield Row("two blocks: bytes read by loading, GB", read[False], read[True], 0.68 * read[True])
    start = time.process_time()
    table_of(folder, torch.bfloat16, 1)
    yield Row(f"two blocks: CPU seconds to make a table of {len(SIGMAS) + 1} levels", time.process_time() - start)


def speed(folder: ModelFolder, repeats: int, edge: int, num_text: int) -> Iterator[Row]:
    bf16 = torch.bfloat16
    models = {"layers": mmdit.build(folder, bf16, None)}
    models["table"] = mmdit.build(folder, bf16, None, table=table_of(folder, bf16, 1))
    sides = {
        name: (lambda model=model: velocity(model, bf16, SIGMAS[[4]], edge, num_text)) for name, model in models.items()
    }
    seconds = in_turn(sides, repeats)
    ratio = median_ratio(seconds["table"], seconds["layers"])
    about = f"{2 * edge * edge} image and {num_text} text tokens, batch 1"
    yield Row(f"two blocks, {about}: CPU time of a forward, table / layers", ratio, 1.0, 1.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[24, 256], help="edge of the image in tokens; text tokens"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    folder = full_width_folder(given.folder)
    rows = [*sizes(folder), *reading(folder)]
    rows += [*equality(folder, torch.bfloat16, (1, 3, 64)), *equality(folder, torch.float32, (1, 3, 64))]
    rows += speed(folder, given.repeats, *given.tokens)
    sys.exit(finish("modulation_table", rows))


if __name__ == "__main__":
    main()
