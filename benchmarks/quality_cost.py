"""Quality against the cost of drawing: MSDM, LoRA and WDLoRA, trained on the same phantoms, side by side in one table.

python benchmarks/quality_cost.py [--systems msdm lora wdlora] [--folder FOLDER] [--set NAME=FOLDER ...]

The commands that a user types train each system by its tiny settings, draw the test masks, and evaluate all sets in one
report. What drawing costs is then measured on one batch of each set, by the sampler that has drawn it:

    parameters   of all networks that run (prompts are cached, so no text encoder does), and how many were trained
    FLOPs        per image, counted by torch in one batch: denoise steps, branches of guidance, VAE
    images/s     of that batch, one thread, weights loaded

Tiny systems on a CPU: their order says nothing of the real ones, whose costs `ccmdist model plan` tells. Another set of
the same masks, such as that of SPADE, joins the report by --set, without costs.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from baselines import ccmdist, files_of, make_world, with_vae
from measure.rows import Row, write
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.data.latent_cache import LatentCache
from ccmdist.jobs.adapter import find
from ccmdist.jobs.network import find_network
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis.generate import ImageSampler
from ccmdist.synthesis.networks import NetworkDrawing
from ccmdist.synthesis.plan import read_plan

SYSTEMS: Final = ("msdm", "lora", "wdlora")
SETTINGS: Final = "configs/synthesize/tiny.yaml"
PAIRED: Final = ("SSIM", "PSNR, dB")
DISTANCES: Final = ("frechet", "precision", "recall")


def trained(system: str, folder: Path, data: list[str]) -> list[str]:
    """Train a system and draw its set; the words that name what draws."""
    run = folder / f"{system}-trained"
    if system == "msdm":
        data, _ = with_vae(folder, data)
        ccmdist("train", *files_of("msdm"), f"run={run}", *data)
        drawing = [f"network={run}/network", *data]
    else:
        ccmdist("train", "configs/train/tiny.yaml", f"run={run}", f"adapter.kind={system}", *data)
        drawing = [f"adapter={run}/adapter", *data]
    words = [*drawing, f"out={folder}/{system}-trained-images"]
    ccmdist("synthesize", SETTINGS, *words)
    return words


def costs(words: Sequence[str]) -> dict[str, float]:
    """What it costs to draw the first batch of a set."""
    config = load(SynthesizeConfig, [Path(SETTINGS)], list(words))
    sampler, network, tensors = opened(config)
    requests = read_plan(config.out).batches[0].requests
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sampler.draw(requests)  # with attention that is made of products, which alone are counted
    start = time.process_time()
    sampler.draw(requests)
    seconds = time.process_time() - start
    return {
        "parameters": sum(one.numel() for part in (network, sampler.codec.vae) for one in part.parameters()),
        "trained": sum(tensor.numel() for tensor in tensors),
        "GFLOP per image": counter.get_total_flops() / len(requests) / 1e9,
        "images/s": len(requests) / seconds,
    }


def opened(config: SynthesizeConfig) -> tuple[Any, torch.nn.Module, list[torch.Tensor]]:
    """What draws a set: the sampler, its network, and what of it was trained."""
    plan = read_plan(config.out)
    if config.network is not None:
        state = find_network(config.network)
        sampler: Any = NetworkDrawing(config, state).open(plan, "synthesis")[0]
        return sampler, sampler.network, [*state.tensors.values(), *sampler.codec.vae.parameters()]
    assert config.adapter is not None, "the words name what draws"
    adapter, model = find(config.adapter), ModelFolder.open(config.data.model)
    cache = LatentCache.open(config.data, model.encoder_identity(), (config.split,))
    sampler = ImageSampler(plan, model, cache, {"synthesis": adapter}, "synthesis")
    return sampler, sampler.model, [tensor for of in adapter.tensors.values() for tensor in of.values()]


def qualities(report: dict[str, Any]) -> dict[str, float]:
    """Figures of a set in the report; distances of distributions are those without weights."""
    paired = {one["label"]: one["mean"] for one in report["fidelity"]["paired"] if one["label"] in PAIRED}
    distances = {
        f"{one['metric']}, {one['extractor']}": one["value"]
        for one in report["fidelity"]["distances"]
        if one["metric"] in DISTANCES
    }
    return {"clDice with the mask": report["adherence"]["cldice"]} | paired | distances


def rows(found: dict[str, dict[str, float]]) -> Iterator[Row]:
    """Each figure of each system, all without limits."""
    for system, figures in found.items():
        for name, value in figures.items():
            yield Row(f"{system}: {name}", value)


def show(found: dict[str, dict[str, float]]) -> None:
    """One line for each figure, one column for each system."""
    table = Table("tiny systems on phantoms, one CPU thread", *found)
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        cells = [f"{figures[name]:,.4g}" if name in figures else "" for figures in found.values()]
        table.add_row(name, *cells)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    parser.add_argument("--folder", type=Path, help="where everything is kept, and found again; else a temporary one")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=FOLDER", help="more sets of the same masks")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        data = make_world(folder)
        words = {system: trained(system, folder, data) for system in given.systems}
        sets = [f"synthetic.{system}={folder}/{system}-trained-images" for system in words]
        sets += [f"synthetic.{one}" for one in given.set]
        ccmdist("evaluate", f"real={folder}/shards", f"out={folder}/cost-report", "memorisation=null", *sets)
        report = json.loads((folder / "cost-report" / "report.json").read_text())["synthetic"]
        found = {name: (costs(words[name]) if name in words else {}) | qualities(report[name]) for name in report}
        show(found)
        write("quality_cost", list(rows(found)))


if __name__ == "__main__":
    main()
