"""What the main thread is doing: one mark for both the ledger, which sums time up, and the watchdog, which limits it.

with sections("checkpoint", step):
    ...
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psutil

SECTIONS: Final = ("startup", "restore", "data_wait", "compute", "validation", "checkpoint")
"""Names of sections; the ledger has a bucket for each."""
JOB_START: Final = "CCMDIST_JOB_START"
"""Environment variable with the Unix seconds at which the batch script began."""
OUTSIDE: Final = "other"
"""The name of what lies between sections."""


@dataclass(frozen=True)
class Section:
    """Something that the main thread does.

    Attributes:
        name: One of the ledger's sections, or "other".
        step: Optimizer steps that were done when it began.
        since: Reading of the monotonic clock when it began.
    """

    name: str
    step: int
    since: float


class Sections:
    """Exclusive time per section since the job began: while an inner section is open its outer one does not count.

    Used by the main thread; other threads may look at ``current``, ``done`` and ``totals``.

    Args:
        began: Unix seconds at which the job began; the time until now counts as "startup".
    """

    def __init__(self, began: float) -> None:
        self._wall, self._monotonic = time.time(), time.monotonic()
        self.began = min(began, self._wall)
        self.totals = dict.fromkeys((*SECTIONS, OUTSIDE), 0.0) | {"startup": self._wall - self.began}
        self.current = Section(OUTSIDE, 0, self._monotonic)
        self.done = 0
        self.is_warm = False
        """Whether a first step has been done, with all that happens only once, such as the building of kernels."""
        self._counted, self._taken = self._monotonic, dict.fromkeys(self.totals, 0.0)

    @contextlib.contextmanager
    def __call__(self, name: str, step: int = 0) -> Iterator[None]:
        """Be in section ``name``, with ``step`` optimizer steps done; a "compute" that ends well does one more."""
        outer, self.done = self.current, step
        self._enter(Section(name, step, time.monotonic()))
        try:
            yield
            if name == "compute":
                self.done, self.is_warm = step + 1, True
        finally:
            self._enter(outer if outer.name != OUTSIDE else Section(OUTSIDE, self.done, time.monotonic()))

    def now(self) -> float:
        """Unix seconds by a clock that never jumps: the wall clock of the start, and what has passed since."""
        return self._wall + time.monotonic() - self._monotonic

    def taken(self) -> dict[str, float]:
        """Seconds per section since this was last called, those of the open one so far included."""
        self._enter(self.current)
        new = {name: self.totals[name] - self._taken[name] for name in SECTIONS}
        self._taken = dict(self.totals)
        return new

    def _enter(self, section: Section) -> None:
        now = time.monotonic()
        self.totals[self.current.name] += now - self._counted
        self.current, self._counted = section, now


def job_began(environment: Mapping[str, str]) -> float:
    """Unix seconds at which this job began: as the batch script says, else when this process was made."""
    with contextlib.suppress(KeyError, ValueError):
        return float(environment[JOB_START])
    # psutil knows the time of the boot in whole seconds only, and the process's start since then in hundredths.
    since_boot = psutil.Process().create_time() - psutil.boot_time()
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot)
