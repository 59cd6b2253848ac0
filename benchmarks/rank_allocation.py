"""What ranks bring where they are: held-out flow loss per trained parameter of several ways to give them to layers.

    python benchmarks/rank_allocation.py [--steps 160] [--seeds 3] [--processes 2] [--ways NAME ...] [--folder FOLDER]

The fitted tiny model learns phantoms of 64 px, a size that it was not fitted at. All ways see the same samples in the
same order with the same noise, for the same number of steps, and may end with the same number of ranks: four for each
linear on average. Where ranks grow they may come to fewer, and LoRA with two and with one shows what fewer cost here.
WDLoRA has its magnitudes besides. Each gets a learning rate by one rule: the best of three for the val split's
subjects, with a seed of its own; and while the best is the least or the largest, one more beyond it. Reported are the
test split's subjects, with other seeds.

All run in the product's engine but AdaLoRA, whose allocator wants gradients that DeepSpeed does not leave: a plain loop
around the same optimizer, in which LoRA has to come to the same loss as in the engine. Nothing else has a limit.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import measure.quiet  # noqa: F401  before anything that imports torch
import torch
from measure.adapter_runs import Trained, in_engine, in_plain_loop, untuned
from measure.random_model import one_rank
from measure.rivals import AdaLoRA, DyLoRA
from measure.rows import Row, finish

from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.models.make import make_model
from ccmdist.precompute.fill import fill_cache

RANKS, MOST_RANKS = 4, 8
"""Of each linear on average at the end; and the largest of one that grows."""
NUM_LINEARS: Final = 44
"""Attention and MLP linears of the tiny model's four blocks, without the four that never get a gradient."""
IMAGE_SIZE_PX, SUBJECTS_PER_GROUP = 64, 40
LEARNING_RATES: Final = tuple(10 ** (exponent / 2) for exponent in range(-8, 1))
"""From 1e-4 to 1, each about three times the one before."""
TRIED_FIRST: Final = (3, 4, 5)
SEARCH_SEED: Final = 1000
"""Of the runs that choose a learning rate, which are not reported."""
COMMON: Final = {
    "run": "unused",
    "data.image_size_px": IMAGE_SIZE_PX,
    "data.dtype": "fp32",
    "base": "fp32",
    "sharding": "replicated",
    "activation_checkpointing": "none",
    "global_batch_size": 8,
    "micro_batch_size": 8,
    "optim.warmup_steps": 10,
    "adapter.kind": "lora",
    "adapter.lora_rank": RANKS,
}
GROWING: Final = {
    "adapter.lora_rank": MOST_RANKS,
    "adapter.alpha": 8,
    "adapter.growth.start_rank": 1,
    "adapter.growth.every_steps": 10,
    "adapter.growth.rank_budget": RANKS * NUM_LINEARS,
}
"""As in configs/train/selora.yaml, but for the interval of tests, which is 40 there, and the bounds."""
WD: Final = {"adapter.kind": "wdlora"}
WAYS: Final[dict[str, tuple[dict[str, Any], Callable[..., Trained]]]] = {
    "LoRA": ({}, in_engine),
    "LoRA, 2 ranks": ({"adapter.lora_rank": 2}, in_engine),
    "LoRA, 1 rank": ({"adapter.lora_rank": 1}, in_engine),
    "AdaLoRA": ({}, partial(in_plain_loop, kind=AdaLoRA)),
    "DyLoRA": ({}, partial(in_engine, kind=DyLoRA)),
    "SeLoRA": (GROWING, in_engine),
    "WDLoRA": (WD, in_engine),
    "Se-WDLoRA": (GROWING | WD, in_engine),
}
"""Settings, and what runs them."""
ANCHOR: Final = "LoRA"
UNTUNED, CHECK = "untuned model", "LoRA in the plain loop of AdaLoRA"
BESIDES: Final = {UNTUNED: ({}, untuned), CHECK: ({}, in_plain_loop)}
"""The same of what is measured for comparison."""


@dataclass(frozen=True)
class World:
    """Where the runs find their data, and how long they are.

    Attributes:
        folder: With shards/, model/ and cache/.
        num_steps: Of every run.
    """

    folder: Path
    num_steps: int

    @property
    def data(self) -> dict[str, Any]:
        """Settings that name the data."""
        return {f"data.{name}": self.folder / name for name in ("shards", "model", "cache")}

    def make(self) -> None:
        """Phantoms, the fitted tiny model and its cache."""
        sizes = [f"size_px={IMAGE_SIZE_PX}", f"subjects_per_group={SUBJECTS_PER_GROUP}"]
        write_phantom_set(load(PhantomShardsConfig, [], [f"out={self.folder}/shards", *sizes]))
        make_model("tiny", "2509", self.folder / "model", seed=0, fitted=True)
        values = self.data | {name: COMMON[name] for name in ("data.image_size_px", "data.dtype")}
        fill_cache(load(PrecomputeConfig, [], _words(values)), 0, 1)


@dataclass
class Way:
    """One way to give ranks to layers, and what it came to.

    Attributes:
        name: As in WAYS or BESIDES.
        world: Of all ways.
        tried: Index of a learning rate -> loss on the val split.
        trained: One for each seed that is reported.
    """

    name: str
    world: World
    tried: dict[int, float] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)

    @property
    def best(self) -> int:
        """Index of the best learning rate."""
        return min(self.tried, key=lambda index: (self.tried[index], index))

    def run(self, num_seeds: int) -> "Way":
        """Find a learning rate, and train with it."""
        missing = list(TRIED_FIRST)
        while missing:
            for index in missing:
                self.tried[index] = self._trained(index, SEARCH_SEED, "val").loss
            beyond = {min(self.tried): self.best - 1, max(self.tried): self.best + 1}
            missing = [index for index in [beyond.get(self.best, -1)] if 0 <= index < len(LEARNING_RATES)]
        return self.run_at(self.best, num_seeds)

    def run_at(self, index: int, num_seeds: int) -> "Way":
        """Train with a given learning rate."""
        self.trained = [self._trained(index, seed, "test") for seed in range(num_seeds)]
        return self

    def _trained(self, index: int, seed: int, split: str) -> Trained:
        settings, run = (WAYS | BESIDES)[self.name]
        lr, start = LEARNING_RATES[index], time.monotonic()
        of_run = {"num_steps": self.world.num_steps, "optim.lr": lr, "seed": seed}
        config = load(TrainConfig, [], _words(COMMON | self.world.data | settings | of_run))
        trained = run(config, one_rank("cpu"), split)
        what = f"{split} {trained.loss:.4f}, {trained.parameters:,} parameters, {time.monotonic() - start:.0f} s"
        print(f"{self.name}, lr {lr:.2g}, seed {seed}: {what}", file=sys.stderr, flush=True)
        return trained


def _words(values: dict[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in values.items()]


def _quiet_worker() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)


def measured(world: World, names: list[str], num_seeds: int, num_processes: int) -> dict[str, Way]:
    """All ways, each in one of a few processes, and what they are compared with."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, context, _quiet_worker) as pool:
        running = {name: pool.submit(Way(name, world).run, num_seeds) for name in names}
        running[UNTUNED] = pool.submit(Way(UNTUNED, world).run_at, 0, num_seeds)
        found = {name: future.result() for name, future in running.items()}
        if ANCHOR in found:
            found[CHECK] = pool.submit(Way(CHECK, world).run_at, found[ANCHOR].best, 1).result()
    return found


def rows_of(found: dict[str, Way]) -> list[Row]:
    """Loss, parameters, and the one by the other, each beside that of the anchor.

    Seeds draw the order, the noise of the run and that of its judgement: so they differ by more than ways do, and the
    difference for the same seed is what counts.
    """
    starts = [trained.loss for trained in found[UNTUNED].trained]
    rows = [Row(f"held-out flow loss, {UNTUNED}: {_over_seeds(starts)}", statistics.median(starts))]
    by_way = {name: way.trained for name, way in found.items() if name in WAYS}
    losses = {name: [trained.loss for trained in of] for name, of in by_way.items()}
    sizes = {name: [float(trained.parameters) for trained in of] for name, of in by_way.items()}
    gains = {
        name: [(start - loss) / size * 1e4 for start, loss, size in zip(starts, losses[name], sizes[name], strict=True)]
        for name in by_way
    }
    beside = losses.get(ANCHOR, starts)
    apart = {name: [loss - other for loss, other in zip(of, beside, strict=True)] for name, of in losses.items()}
    for what, values in (
        ("held-out flow loss", losses),
        (f"the same less that of {ANCHOR if ANCHOR in losses else UNTUNED} with the same seed", apart),
        ("trained parameters at the end", sizes),
        ("loss less than untuned per 10,000 parameters", gains),
    ):
        anchor = statistics.median(values[ANCHOR]) if ANCHOR in values else None
        for name, of in values.items():
            claim = f"{what}, {name} (lr {LEARNING_RATES[found[name].best]:.2g}): {_over_seeds(of)}"
            rows.append(Row(claim, statistics.median(of), None if name == ANCHOR else anchor))
    if CHECK in found:
        difference = abs(found[CHECK].trained[0].loss - losses[ANCHOR][0])
        rows.append(Row(f"loss of {CHECK}, from that in the engine", difference, 0, 1e-6))
    return rows


def _over_seeds(values: Sequence[float]) -> str:
    return f"median of {len(values)} seeds, {min(values):.6g} to {max(values):.6g}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where shards, model and cache are kept, and found again")
    given = parser.parse_args()
    _quiet_worker()
    with tempfile.TemporaryDirectory() as temporary:
        world = World((given.folder or Path(temporary)).resolve(), given.steps)
        if not (world.folder / "cache").exists():
            world.make()
        return finish("rank_allocation", rows_of(measured(world, given.ways, given.seeds, given.processes)))


if __name__ == "__main__":
    sys.exit(main())
