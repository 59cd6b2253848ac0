"""What of an evaluation costs time, in units that any process may do: each leaves one file, and is done once.

Workers share the units without talking to each other: worker i of n takes ``units[i::n]`` minus what is done. Whoever
runs the command alone, after them, does what is left, compares and reports. No unit reads what another one leaves.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from ccmdist.console import log, tracked
from ccmdist.errors import Preempted


class Unit(Protocol):
    """A piece of work that is done to its end or not at all."""

    def is_done(self) -> bool:
        """Whether the file that it leaves is there, and can be read."""
        ...

    def run(self) -> None:
        """Do it, and commit its file."""
        ...


def open_units(units: Sequence[Unit]) -> list[Unit]:
    """Those that no run has done yet."""
    return [unit for unit in units if not unit.is_done()]


def do_share(
    units: Sequence[Unit], worker_index: int, num_workers: int, should_stop: Callable[[], bool] = lambda: False
) -> None:
    """Do what is open of one worker's share.

    Args:
        units: All units, in an order that every worker sees alike.
        worker_index: This worker takes ``units[worker_index::num_workers]``.
        num_workers: Workers that share the units.
        should_stop: Asked between units.

    Raises:
        Preempted: If ``should_stop`` said so while there was work left; what was done is committed.
    """
    mine = units[worker_index::num_workers]
    left = open_units(mine)
    log.info("%d of this worker's %d units of work are open", len(left), len(mine))
    for done, unit in enumerate(tracked(left, "units", len(left))):
        if should_stop():
            raise Preempted(
                f"evaluate: stopped with {done} of {len(left)} units done and committed", "run the same command again"
            )
        unit.run()
