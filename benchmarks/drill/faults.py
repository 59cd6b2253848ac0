"""Which faults a drill makes, in which order: a pure function of a seed."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

SIGNAL_ONE = "signal to one rank"
SIGNAL_ALL = "signal to all ranks"
KILL_ONE = "kill of one rank at a step"
KILL_ALL = "kill of all ranks at once"
KILL_OPERATION = "kill at an I/O operation of a save"
KILL_IN_WRITE = "kill amid the write of a file"
KILL_ANYTIME = "kill of a rank at any moment"
SIGNAL_ANYTIME = "signal at any moment"
FULL_DISK = "full disk"
DAMAGE = "damaged checkpoint"
HANG = "hung rank (SIGSTOP)"
KINDS = (
    *(SIGNAL_ONE, SIGNAL_ALL, SIGNAL_ANYTIME, KILL_ONE, KILL_ALL, KILL_ANYTIME),
    *(KILL_OPERATION, KILL_IN_WRITE, FULL_DISK, DAMAGE, HANG),
)
SIGNALS = (SIGNAL_ONE, SIGNAL_ALL, SIGNAL_ANYTIME)
KILLS = (KILL_ONE, KILL_ALL, KILL_ANYTIME, KILL_OPERATION, KILL_IN_WRITE, HANG)
POINTS = ("step", "checkpoint.begin", "checkpoint.write", "checkpoint.before_manifest", "checkpoint.after_rename")
MAX_OFFSET = 4
OPERATIONS_OF_A_SAVE = (18, 5)
"""On the first rank (which also commits and removes old checkpoints), and on every other rank."""


@dataclass(frozen=True)
class Fault:
    """One fault, said relative to the step at which the attempt that suffers it starts.

    Attributes:
        kind: One of KINDS.
        rank: The rank that suffers, or None for all.
        action: What happens to it, as CCMDIST_FAULT spells it; for damage: how a file is damaged.
        point: Where it happens.
        offset: Steps after the start, for faults at a step.
        operation: Number of the I/O operation, or 0.
        fraction: In [0, 1): of a file, of the free space, of the seconds of an attempt.
    """

    kind: str
    rank: int | None = None
    action: str = "sigkill"
    point: str = "step"
    offset: int = 0
    operation: int = 0
    fraction: float = 0.0

    def variable(self, start: int, every_steps: int, num_ranks: int) -> str:
        """The value of CCMDIST_FAULT for an attempt that starts at step ``start``."""
        if self.kind in (FULL_DISK, DAMAGE):
            # These do not end an attempt by themselves; a signal does, after the next saves were tried.
            return _at("sigusr2", "step", range(num_ranks), start + MAX_OFFSET)
        if self.kind in (SIGNAL_ANYTIME, KILL_ANYTIME, KILL_IN_WRITE):
            return ""
        step = start + self.offset if self.point == "step" else (start // every_steps + 1) * every_steps
        ranks = range(num_ranks) if self.rank is None else [self.rank]
        return _at(self.action, self.point, ranks, step, f",operation={self.operation}" if self.operation else "")

    def __str__(self) -> str:
        place = f" at {self.point}" + (f" operation {self.operation}" if self.operation else "")
        who = "all ranks" if self.rank is None else f"rank {self.rank}"
        return f"{self.kind}: {self.action} {who}{place} +{self.offset} ({self.fraction:.2f})"


def _at(action: str, point: str, ranks: range | list[int], step: int, suffix: str = "") -> str:
    return ";".join(f"{action}@{point}:rank={rank},step={step}{suffix}" for rank in ranks)


def planned_faults(num_faults: int, num_ranks: int, seed: int) -> Iterator[Fault]:
    """``num_faults`` random faults; every kind is drawn before one is drawn again."""
    source = random.Random(seed)
    kinds: list[str] = []
    for _ in range(num_faults):
        kinds = kinds or source.sample(KINDS, len(KINDS))
        yield _drawn(kinds.pop(), num_ranks, source)


def _drawn(kind: str, num_ranks: int, source: random.Random) -> Fault:
    rank, offset, fraction = source.randrange(num_ranks), source.randint(0, MAX_OFFSET), source.random()
    signal_name = source.choice(("sigusr2", "sigterm"))
    if kind == SIGNAL_ONE:
        return Fault(kind, rank, signal_name, source.choice(POINTS), offset)
    if kind == SIGNAL_ALL:
        return Fault(kind, None, signal_name, "step", offset)
    if kind == SIGNAL_ANYTIME:
        return Fault(kind, None, signal_name, "any moment", fraction=fraction)
    if kind == KILL_ONE:
        return Fault(kind, rank, "sigkill", "step", offset)
    if kind == KILL_ALL:
        return Fault(kind, None, "sigkill", source.choice(("step", "checkpoint.write")), offset)
    if kind == KILL_ANYTIME:
        return Fault(kind, rank, "sigkill", "any moment", fraction=fraction)
    if kind == KILL_OPERATION:
        return Fault(
            *(kind, rank, "sigkill", "checkpoint.begin", 0),
            operation=source.randint(1, OPERATIONS_OF_A_SAVE[min(rank, 1)]),
        )
    if kind == KILL_IN_WRITE:
        return Fault(kind, rank, "sigxfsz", "slices file", fraction=fraction)
    if kind == FULL_DISK:
        return Fault(kind, None, source.choice(("before the start", "after a step")), "run folder", fraction=fraction)
    if kind == DAMAGE:
        action = source.choice(("truncate", "flip a bit of", "empty", "remove"))
        return Fault(kind, None, action, "newest checkpoint", fraction=fraction)
    return Fault(HANG, rank, "sigstop", source.choice(("step", "checkpoint.write")), offset)
