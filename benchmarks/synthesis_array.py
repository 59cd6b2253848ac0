"""An array of workers draws one set while some of them are killed: nothing is missing, and nobody waits for the last.

python benchmarks/synthesis_array.py [--workers 8] [--kills 6] [--seed 0] [--images-per-mask 20] [--keep FOLDER]

Real workers with the real tiny model draw a plan of many small batches. At seeded random moments in the first third of
the work one is killed by SIGKILL and started again some seconds later, as a requeue would. Three sets are drawn: by
workers that help each other (ours), by workers that draw their share `batches[i::n]` and nothing else (the anchor),
under the same kills, and by one worker without any. Measured is, from the moment when the last worker that was started
again has its model, until the set is complete:

    makespan / ideal,    ideal = batches left x seconds per batch / workers

Seconds per batch are the mean over just these batches, by the clock of the workers that drew them, so that it does not
matter how many workers share a core. The exit code is 1 if a limit does not hold.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from measure.rows import Row, finish

from ccmdist.config.data import DataSettings, PhantomShardsConfig, PrecomputeConfig
from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.data.manifest import MANIFEST
from ccmdist.data.reader import verify_set
from ccmdist.errors import ShardError
from ccmdist.jobs.synthesize import open_units
from ccmdist.synthesis.plan import PLAN, read_plan
from ccmdist.synthesis.verify import verify_against_plan

PRELOADED = ["ccmdist.console", "ccmdist.synthesis.generate", "ccmdist.models.make"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
SIZE_PX = 64
SECONDS_OF_A_REQUEUE = 3.0
SECONDS_OF_A_SET = 600.0
GOAL = 1.05


@dataclass(frozen=True)
class Event:
    """One thing that a worker did.

    Attributes:
        worker: Its index.
        pid: Its process.
        what: "ready" with its model, "begin" or "end" of a batch.
        batch: Which one; -1 for "ready".
        time: On the clock that all processes share, in seconds.
    """

    worker: int
    pid: int
    what: str
    batch: int
    time: float


@dataclass(frozen=True)
class Drawn:
    """How a set came to be.

    Attributes:
        folder: Of the set.
        events: In the order of time.
        restarted: Processes that were started in the place of a killed one.
        end: When the last worker had ended.
        num_kills: Workers that were killed.
    """

    folder: Path
    events: list[Event]
    restarted: frozenset[int]
    end: float
    num_kills: int

    def spans(self) -> list[tuple[int, float, float]]:
        """Batch, begin and end of everything that was drawn to its end."""
        begun: dict[tuple[int, int], float] = {}
        found = []
        for event in self.events:
            if event.what == "begin":
                begun[event.pid, event.batch] = event.time
            elif event.what == "end":
                found.append((event.batch, begun[event.pid, event.batch], event.time))
        return found

    def last_restart(self) -> float:
        """When the last worker that was started again had its model."""
        ready = [event.time for event in self.events if event.what == "ready" and event.pid in self.restarted]
        return max(ready, default=self.events[0].time)

    def num_twice(self) -> int:
        """Batches that two workers drew to the end."""
        return sum(times > 1 for times in Counter(batch for batch, _, _ in self.spans()).values())

    def makespan_over_ideal(self, num_workers: int) -> tuple[float, int, float, float]:
        """The ratio, batches left at the last restart, seconds of one, and the makespan.

        A batch that was under way at that moment counts with the part that was left of it.
        """
        start = self.last_restart()
        seconds = [end - begin for _, begin, end in self.spans() if end > start]
        left = sum((end - max(begin, start)) / (end - begin) for _, begin, end in self.spans() if end > start)
        per_batch = sum(seconds) / len(seconds)
        makespan = max(end for _, _, end in self.spans()) - start
        return makespan * num_workers / (left * per_batch), round(left), per_batch, makespan


def make_world(folder: Path) -> None:
    """Write shards, the tiny model and its cache; for a process of its own, which has loaded torch."""
    from ccmdist.data.phantom_shards import write_phantom_set
    from ccmdist.models.make import make_model
    from ccmdist.precompute.fill import fill_cache

    phantoms = {"subjects_per_group": 13, "frames_per_subject": 2, "test_fraction": 0.4, "val_fraction": 0.0}
    write_phantom_set(PhantomShardsConfig(out=folder / "shards", size_px=SIZE_PX, samples_per_shard=8, **phantoms))
    make_model("tiny", "2509", folder / "model", seed=0)
    fill_cache(PrecomputeConfig(data=data_of(folder), splits=("test",)), 0, 1)


def data_of(folder: Path) -> DataSettings:
    """The section that names the world's cache."""
    places = {name: folder / name for name in ("shards", "model", "cache")}
    return DataSettings(image_size_px=SIZE_PX, dtype="fp32", **places)


def work(config_json: str, worker: int, num_workers: int, log: str, helps: bool) -> None:
    """One worker, as `ccmdist synthesize` runs it, which also writes down what it does."""
    import torch

    from ccmdist.synthesis import generate
    from ccmdist.synthesis.output import SyntheticSet

    torch.set_num_threads(1)
    stream = Path(log).open("a", buffering=1)  # noqa: SIM115 (kept until the process ends)

    def note(what: str, batch: int = -1) -> None:
        values = {"worker": worker, "pid": os.getpid(), "what": what, "batch": batch, "time": time.monotonic()}
        stream.write(json.dumps(values) + "\n")

    draw, sampler = generate.Worker._draw, generate.ImageSampler.__init__

    def noted_draw(self: generate.Worker, batch: int) -> None:
        note("begin", batch)
        draw(self, batch)
        note("end", batch)

    def noted_sampler(self: generate.ImageSampler, *arguments: Any) -> None:
        sampler(self, *arguments)
        note("ready")

    generate.Worker._draw, generate.ImageSampler.__init__ = noted_draw, noted_sampler  # type: ignore[method-assign]
    if not helps:
        SyntheticSet.open_for_help = lambda self, index, number: []  # type: ignore[method-assign]
    generate.synthesize(SynthesizeConfig.model_validate_json(config_json), None, worker, num_workers)


def draw_set(
    context: ForkServerContext, config: SynthesizeConfig, num_workers: int, kills: list[tuple[float, int]], helps: bool
) -> Drawn:
    """Draw a set with some workers; ``kills`` says at which part of the work which worker is killed."""
    log = config.out.with_suffix(".jsonl")

    def started(worker: int) -> BaseProcess:
        process = context.Process(target=work, args=(config.model_dump_json(), worker, num_workers, str(log), helps))
        process.start()
        return process

    alive = {worker: started(worker) for worker in range(num_workers)}
    again: dict[int, float] = {}
    restarted: set[int] = set()
    waiting, num_kills, deadline = list(kills), 0, time.monotonic() + SECONDS_OF_A_SET
    while again or any(process.is_alive() for process in alive.values()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{config.out}: is not complete after {SECONDS_OF_A_SET:.0f} s")
        if waiting and config.out.joinpath(PLAN).exists() and progress(config) >= waiting[0][0]:
            victim = waiting.pop(0)[1]
            num_kills += alive[victim].is_alive()
            alive[victim].kill()
            again[victim] = time.monotonic() + SECONDS_OF_A_REQUEUE
        for worker in [worker for worker, due in again.items() if time.monotonic() >= due]:
            del again[worker]
            alive[worker] = started(worker)
            restarted.add(alive[worker].pid or 0)
        time.sleep(0.2)
    end = time.monotonic()
    events = sorted((Event(**json.loads(line)) for line in log.read_text().splitlines()), key=lambda e: e.time)
    return Drawn(config.out, events, frozenset(restarted), end, num_kills)


def progress(config: SynthesizeConfig) -> float:
    """Part of the batches that are committed."""
    return 1 - open_units(config) / len(read_plan(config.out).batches)


def files_of(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a set."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def problems_of(folder: Path) -> list[str]:
    """What `ccmdist shards verify --plan` has to say against a set."""
    if not (folder / MANIFEST).exists():
        return [f"{folder}: is not complete"]
    try:
        verify_set(folder)
        verify_against_plan(folder)
    except ShardError as error:
        return error.message.splitlines()
    return []


def rows_of(ours: Drawn, static: Drawn, single: Drawn, num_workers: int) -> list[Row]:
    """Claims with what was measured, what it is compared with, and the limit that must hold."""
    ratio, left, per_batch, makespan = ours.makespan_over_ideal(num_workers)
    other, other_left, other_per_batch, other_makespan = static.makespan_over_ideal(num_workers)
    different = files_of(ours.folder).items() ^ files_of(single.folder).items()
    count = f"{num_workers} workers, {ours.num_kills} kills"
    anchor = (
        f"static batches[i::n] under the same kills: {other:.3f} ({other_makespan:.1f} s for {other_left} batches of "
        f"{other_per_batch:.2f} s)"
    )
    detail = f"{makespan:.1f} s for {left} batches of {per_batch:.2f} s"
    return [
        _at_most(f"makespan / ideal for the work left ({count}; {detail})", round(ratio, 3), GOAL, anchor),
        _at_most(
            "problems that shards verify --plan names: missing, duplicate, foreign", len(problems_of(ours.folder)), 0
        ),
        _at_most("files that differ from those of a single worker", len({name for name, _ in different}), 0),
        Row("batches drawn twice to the end", ours.num_twice()),
        _at_most("batches that kills made to be drawn again", lost(ours), ours.num_kills, "one for each kill"),
    ]


def lost(drawn: Drawn) -> int:
    """Batches that were begun and not ended."""
    return sum(event.what == "begin" for event in drawn.events) - len(drawn.spans())


def _at_most(claim: str, ours: float, limit: float, anchor: str | None = None) -> Row:
    return Row(claim, ours, anchor, limit, goal=limit)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images-per-mask", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="folder for the sets, which are removed without it")
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="ccmdist-array-"))
    try:
        rows = measure(options, folder)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    return finish("synthesis_array", rows)


def measure(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Draw the three sets in a folder and compare them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    maker = context.Process(target=make_world, args=(folder,))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise RuntimeError("the world could not be made")
    rng = random.Random(options.seed)
    kills = sorted((rng.uniform(0.05, 0.3), rng.randrange(options.workers)) for _ in range(options.kills))

    def drawn(name: str, num_workers: int, planned: list[tuple[float, int]], helps: bool) -> Drawn:
        settings = [f"out={folder}/{name}", f"images_per_mask={options.images_per_mask}", "batch_size=2"]
        sampler = ["denoise_steps=2", "guidance_scale=1", "batches_per_shard=8"]
        data = {"data": data_of(folder).model_dump(mode="json")}
        path = folder / f"{name}.yaml"
        path.write_text(json.dumps(data))
        found = draw_set(context, load(SynthesizeConfig, [path], settings + sampler), num_workers, planned, helps)
        print(f"{name}: {len(found.spans())} batches in {found.end - found.events[0].time:.1f} s", flush=True)
        return found

    ours = drawn("ours", options.workers, kills, True)
    static = drawn("static", options.workers, kills, False)
    single = drawn("single", 1, [], True)
    return rows_of(ours, static, single, options.workers)


if __name__ == "__main__":
    sys.exit(main())
