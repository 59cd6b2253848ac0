"""The whole chain on one CPU machine, as the commands that a user would type; done parts are not done again."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ccmdist.cluster.faults import VARIABLE
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.errors import EXIT_DONE, EXIT_REQUEUE, RunError

CONFIG = Path("configs/train/tiny.yaml")
IMAGE_SIZE_PX = 128
NUM_STEPS = 120
PREEMPTED_AT_STEP = 50
NUM_WORKERS = 2


@dataclass(frozen=True)
class Command:
    """One command of the chain.

    Attributes:
        words: What follows ``ccmdist``.
        done: A path that exists when it has nothing left to do, where the command does not find that out itself.
        fault: A drill that the command suffers; it then has to end with exit code 75.
        num_workers: Processes that share its work, as the tasks of an array do.
    """

    words: tuple[str, ...]
    done: Path | None = None
    fault: str = ""
    num_workers: int = 1


def chain(out: Path) -> list[Command]:
    """The commands of the demo, in order.

    Raises:
        RunError: If there is no clone of the project in the working folder, whose configs are used.
    """
    if not CONFIG.is_file():
        raise RunError(f"demo: there is no {CONFIG} here", "run it in a clone of the project")
    shards, model, cache, run = out / "shards", out / "model", out / "cache", out / "run"
    data = (
        f"data.shards={shards}",
        f"data.model={model}",
        f"data.cache={cache}",
        f"data.image_size_px={IMAGE_SIZE_PX}",
        "data.dtype=fp32",
    )
    train = ("train", str(CONFIG), f"run={run}", *data, f"num_steps={NUM_STEPS}", "processes=2")
    synthesize = ("synthesize", "configs/synthesize/tiny.yaml", *data)
    tuned, untuned = out / "synthetic" / "wdlora", out / "synthetic" / "untuned"
    # Of training subjects' masks: for training others with, not for release.
    for_training = out / "synthetic" / "wdlora-for-training"
    evaluate = (
        "evaluate",
        "configs/evaluate/tiny.yaml",
        f"real={shards}",
        f"synthetic.wdlora={tuned}",
        f"synthetic.untuned={untuned}",
        f"downstream.synthetic.wdlora={for_training}",
        "downstream.arms=[real,wdlora:0.5]",
        f"out={out / 'report'}",
    )
    return [
        Command(("shards", "phantom", f"out={shards}", f"size_px={IMAGE_SIZE_PX}", "subjects_per_group=40")),
        Command(("model", "make", "--size", "tiny", "--fitted", "--out", str(model)), done=model / "model_index.json"),
        Command(("precompute", "configs/precompute/tiny.yaml", *data)),
        Command(train, done=run / "outcome.json", fault=f"sigusr2@step:rank=1,step={PREEMPTED_AT_STEP}"),
        Command(train),
        Command((*synthesize, f"adapter={run / 'adapter'}", f"out={tuned}"), num_workers=NUM_WORKERS),
        Command((*synthesize, f"out={untuned}"), num_workers=NUM_WORKERS),
        Command(
            (*synthesize, f"adapter={run / 'adapter'}", "split=train", f"out={for_training}"), num_workers=NUM_WORKERS
        ),
        Command(evaluate, num_workers=NUM_WORKERS),
        Command(evaluate),
        Command(("adapter", "verify", str(run / "adapter"), "--model", str(model))),
    ]


def run(out: Path) -> None:
    """Run the chain in ``out`` and print what came out and where it lies.

    Raises:
        RunError: If a command ends with another exit code than it should.
    """
    console = Console()
    for command in chain(out):
        execute(command, console)
    summarise(out, console)


def execute(command: Command, console: Console) -> None:
    """Show a command and run it, unless what it makes is there.

    Raises:
        RunError: If it ends with another exit code than it should.
    """
    # A run that was already beyond the step of the drill when the demo was stopped ends without one.
    expected = (EXIT_REQUEUE, EXIT_DONE) if command.fault else (EXIT_DONE,)
    if command.done is not None and command.done.exists():
        return
    drill = "kill -USR2 one rank of: " if command.fault else ""
    console.print(f"\n$ {drill}ccmdist {shlex.join(command.words)}", markup=False, highlight=False, soft_wrap=True)
    code = _exit_code(command)
    if code not in expected:
        raise RunError(
            f"demo: `ccmdist {shlex.join(command.words)}` ended with exit code {code}, expected {expected[0]}",
            "read the lines above; the same command goes on from what is done",
        )


def _exit_code(command: Command) -> int:
    """Of the command; of several workers the first that is not zero."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    if command.fault:
        environment[VARIABLE] = command.fault
    words = [sys.executable, "-m", "ccmdist", *command.words]
    if command.num_workers == 1:
        return subprocess.run(words, env=environment, check=False).returncode
    environment["WORLD_SIZE"] = str(command.num_workers)
    workers = [
        subprocess.Popen(words, env=environment | {"RANK": str(index), "LOCAL_RANK": str(index)})
        for index in range(command.num_workers)
    ]
    return next(filter(None, [worker.wait() for worker in workers]), EXIT_DONE)


def summarise(out: Path, console: Console) -> None:
    """Print a short table of what was measured, and where everything lies."""
    run = RunDirectory(out / "run")
    console.print(_table(json.loads((out / "report" / "report.json").read_text())))
    first, last = held_out_losses(run.tensorboard)
    console.print(f"held-out loss: {first:.4f} untuned, {last:.4f} tuned ({last / first:.2f} x)")
    steps = " -> ".join(f"{a['first_step']}..{a['last_step']}" for a in run.attempts())
    console.print(f"training attempts (steps): {steps}")
    console.print("Phantoms are phantoms: no number here says anything of patients.")
    for what, path in {
        "report": out / "report" / "report.html",
        "adapter": run.adapter,
        "shards": out / "synthetic" / "wdlora",
    }.items():
        console.print(f"{what + ':':<12}{path}", soft_wrap=True)
    console.print(f"{'curves:':<12}tensorboard --logdir {run.tensorboard}", soft_wrap=True)


def _table(report: dict[str, Any]) -> Table:
    """Agreement of the nerves that are found in images with the masks, for the sets of the report."""
    table = Table("", "real (phantom)", *report["synthetic"], title="nerves found in the images against their masks")
    real, sets = report["segmenter_error"], report["synthetic"].values()
    for label, name in (("images", "num_images"), ("clDice", "cldice"), ("Dice", "dice"), ("offset, px", "offset_px")):
        values = [real[name], *(one["adherence"][name] for one in sets)]
        table.add_row(label, *("-" if value is None else f"{value:.3g}" for value in values))
    return table


def held_out_losses(events: Path) -> tuple[float, float]:
    """Held-out loss, mean over noise levels, before the first and after the last step of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(events))
    reader.Reload()
    losses = [event.value for event in reader.Scalars("held_out/mean")]
    return losses[0], losses[-1]
