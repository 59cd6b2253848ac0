"""Two or more sides timed in turn, by CPU time: on a shared machine only ratios of interleaved runs mean something."""

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(sides: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of process CPU time of every side, run in turn ``repeats`` times after ``warm_up`` runs each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(-warm_up, repeats):
        for name, run in sides.items():
            start = time.process_time()
            run()
            if index >= 0:
                seconds[name].append(time.process_time() - start)
    return seconds


def median_ratio(ours: list[float], anchor: list[float]) -> float:
    """Median of the ratios of runs that were made one after the other."""
    return statistics.median(a / b for a, b in zip(ours, anchor, strict=True))
