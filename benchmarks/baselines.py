"""Baselines from scratch learn to draw nerves where masks want them, on phantoms, in minutes on a CPU.

The commands that a user types: shards, cache, training by configs/train/tiny_{spade,maisi,msdm}.yaml, synthesis of the
test masks. MSDM has a VAE of its own to train before, and a cache of its latents. Nerves are found by the one frozen
segmenter and compared with the masks by clDice. The anchor of a network is the same network after its first updates.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from measure.rows import ROOT, Row, finish

from ccmdist.ccm.overlap import centreline_dice
from ccmdist.ccm.segmenter import segment
from ccmdist.data.reader import read_split

MARGINS = {"spade": 0.25, "maisi": 0.15, "msdm": 0.3}
"""By how much clDice has to exceed that of the network after its first updates."""
BEGINNING = 2
"""Steps of that one: of SPADE one for each of its networks."""


def ccmdist(*words: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "ccmdist", *words], cwd=ROOT, env=environment, check=True)


def make_world(folder: Path) -> list[str]:
    """Phantoms of 128 px, the fitted tiny model and its cache; the words that name them."""
    data = [f"data.{name}={folder}/{name}" for name in ("shards", "model", "cache")]
    ccmdist("shards", "phantom", f"out={folder}/shards", "size_px=128", "subjects_per_group=40")
    if not (folder / "model").exists():
        ccmdist("model", "make", "--size", "tiny", "--fitted", "--out", str(folder / "model"))
    ccmdist("precompute", "configs/precompute/tiny.yaml", *data)
    return data


def adherence(folder: Path) -> float:
    """Mean clDice of the nerves found in the images of a set with their masks."""
    triples = read_split(folder, "test")
    return float(np.mean([centreline_dice(segment(triple.image), triple.nerve_mask) for triple in triples]))


def files_of(kind: str) -> list[str]:
    """Settings of the training of a kind."""
    return [f"configs/train/{name}.yaml" for name in ("tiny", kind, f"tiny_{kind}")]


def with_vae(folder: Path, data: list[str]) -> tuple[list[str], float]:
    """Train the VAE of MSDM and cache its latents; the words that name them, and the minutes of the training."""
    start, encoders = time.monotonic(), folder / "msdm_vae/network"
    ccmdist("train", *files_of("msdm_vae"), f"run={folder}/msdm_vae", *data)
    minutes = (time.monotonic() - start) / 60
    data = [*data, f"data.model={encoders}"]
    ccmdist("precompute", "configs/precompute/tiny.yaml", *data)
    return data, minutes


def learnt(kind: str, folder: Path, data: list[str]) -> Iterator[Row]:
    """What the network draws after its training, by clDice, and the time of the training."""
    found, files = {}, files_of(kind)
    if kind == "msdm":
        data, minutes_of_vae = with_vae(folder, data)
        yield Row("msdm: minutes of training of its VAE", minutes_of_vae)
    for name, overrides in (("begun", [f"num_steps={BEGINNING}", "optim.warmup_steps=0"]), ("trained", [])):
        run, out = folder / f"{kind}-{name}", folder / f"{kind}-{name}-images"
        start = time.monotonic()
        ccmdist("train", *files, f"run={run}", *data, *overrides)
        minutes = (time.monotonic() - start) / 60
        ccmdist("synthesize", "configs/synthesize/tiny.yaml", f"network={run}/network", f"out={out}", *data)
        found[name] = adherence(out)
    least = found["begun"] + MARGINS[kind]
    yield Row(
        f"{kind}: clDice of nerves in drawn images with their masks",
        found["trained"],
        found["begun"],
        least,
        at_least=True,
    )
    yield Row(f"{kind}: minutes of training", minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(MARGINS), choices=list(MARGINS))
    parser.add_argument("--folder", type=Path, help="where everything is kept, and found again; else a temporary one")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        data = make_world(folder)
        rows = [Row("real phantoms: clDice of nerves found with their masks", adherence(folder / "shards"))]
        for kind in given.kinds:
            rows += learnt(kind, folder, data)
    sys.exit(finish("baselines", rows))


if __name__ == "__main__":
    main()
