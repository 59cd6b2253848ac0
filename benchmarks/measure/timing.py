"""How long something takes: by the clock where a GPU computes, else by CPU time, for a machine that is shared.

Two or more sides run in turn: only ratios of runs that were made one after the other mean something.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Final

import torch

CPU: Final = torch.device("cpu")


def seconds_of(run: Callable[[], object], repeats: int, warm_up: int = 1, device: torch.device = CPU) -> list[float]:
    """Seconds of each of ``repeats`` runs that follow ``warm_up`` others."""
    return in_turn({"run": run}, repeats, warm_up, device)["run"]


def in_turn(
    sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of every side, run in turn ``repeats`` times after ``warm_up`` runs each."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-warm_up, repeats):
        for name, run in sides.items():
            _wait_for(device)
            start = clock()
            run()
            _wait_for(device)
            if index >= 0:
                seconds[name].append(clock() - start)
    return seconds


def median_ratio(ours: list[float], anchor: list[float]) -> float:
    """Median of the ratios of runs that were made one after the other."""
    return statistics.median(a / b for a, b in zip(ours, anchor, strict=True))


def _wait_for(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
