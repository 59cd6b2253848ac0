"""What a process of its own runs: scripts of benchmarks/gpu on a model that is small in every way."""

import importlib
import os
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
SMALL = ["--device", "cpu", "--heads", "1", "--image-size-px", "32", "--text-tokens", "8"]
SCRIPTS = {
    "training": ["--micro-batch-sizes", "1", "2", "--recompute", "full", "selective", "--repeats", "1"],
    "adapter_ratio": ["--repeats", "1"],
    "memory": ["--bases", "bf16", "nf4"],
    "planner": ["--configurations", "full:1"],
    "synthesis": [],
    "attention": ["--repeats", "1"],
}


def run_scripts(results, shown):
    """Run every script of :data:`SCRIPTS`, with its results in a folder and its output in a file."""
    sys.path[:0] = [str(BENCHMARKS / "gpu"), str(BENCHMARKS)]
    import torch

    torch.set_num_threads(1)
    importlib.import_module("measure.rows").RESULTS = Path(results)
    with Path(shown).open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        for name, arguments in SCRIPTS.items():
            sys.argv = [str(BENCHMARKS / "gpu" / f"{name}.py"), *SMALL, *arguments]
            assert importlib.import_module(name).main() == 0, name
    sys.exit(0)
