"""The whole chain on one CPU machine, as the commands that a user would type; done parts are not done again."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ccmdist.cluster.faults import VARIABLE
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.errors import EXIT_DONE, EXIT_REQUEUE, RunError

IMAGE_SIZE_PX = 128
NUM_STEPS = 120
PREEMPTED_AT_STEP = 50


@dataclass(frozen=True)
class Command:
    """One command of the chain.

    Attributes:
        words: What follows ``ccmdist``.
        done: A path that exists when it has nothing left to do, where the command does not find that out itself.
        fault: A drill that the command suffers; it then has to end with exit code 75.
    """

    words: tuple[str, ...]
    done: Path | None = None
    fault: str = ""


def chain(out: Path) -> list[Command]:
    """The commands of the demo, in order."""
    shards, model, cache, run = out / "shards", out / "model", out / "cache", out / "run"
    data = (f"data.shards={shards}", f"data.model={model}", f"data.cache={cache}", f"data.image_size_px={IMAGE_SIZE_PX}")
    data = (*data, "data.dtype=fp32")
    train = ("train", "configs/train/tiny.yaml", f"run={run}", *data, f"num_steps={NUM_STEPS}", "processes=2")
    synthesize = ("synthesize", "configs/synthesize/tiny.yaml", *data)
    tuned, untuned = out / "synthetic" / "wdlora", out / "synthetic" / "untuned"
    return [
        Command(("shards", "phantom", f"out={shards}", f"size_px={IMAGE_SIZE_PX}", "subjects_per_group=40")),
        Command(("model", "make", "--size", "tiny", "--fitted", "--out", str(model)), done=model / "model_index.json"),
        Command(("precompute", "configs/precompute/tiny.yaml", *data)),
        Command(train, done=run / "outcome.json", fault=f"sigusr2@step:rank=1,step={PREEMPTED_AT_STEP}"),
        Command(train),
        Command((*synthesize, f"adapter={run / 'adapter'}", f"out={tuned}")),
        Command((*synthesize, f"out={untuned}")),
        Command(
            (
                "evaluate",
                "configs/evaluate/tiny.yaml",
                f"real={shards}",
                f"synthetic.wdlora={tuned}",
                f"synthetic.untuned={untuned}",
                f"out={out / 'report'}",
            )
        ),
        Command(("adapter", "verify", str(run / "adapter"), "--model", str(model))),
    ]


def run(out: Path) -> None:
    """Run the chain in ``out`` and print what came out and where it lies.

    Raises:
        RunError: If a command ends with another exit code than it should.
    """
    for command in chain(out):
        expected = EXIT_REQUEUE if command.fault else EXIT_DONE
        if command.done is not None and command.done.exists():
            continue
        print(f"\n$ {'kill -USR2 one rank of: ' if command.fault else ''}ccmdist {shlex.join(command.words)}", flush=True)
        code = _execute(command)
        if code != expected:
            raise RunError(
                f"demo: `ccmdist {shlex.join(command.words)}` ended with exit code {code}, expected {expected}",
                "read the lines above; the same command goes on from what is done",
            )
    _summarise(out)
