"""What a drill has shown, as a table and as rows that other programs can read."""

import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from measure.rows import Row

from drill import faults as kinds
from drill.attempt import Attempt
from drill.world import EVERY_STEPS

VERDICTS = {True: "holds", False: "FAILS", None: "told "}
"""By whether a row holds; None where there is no limit."""


def effective_share(attempts: Sequence[Attempt]) -> float:
    """ETTR: seconds of the steps whose result survived, by the wall time of all attempts."""
    surviving: dict[int, float] = {}
    for attempt in attempts:
        surviving |= attempt.durations()  # the last time a step was done is the one that counts
    return sum(surviving.values()) / (attempts[-1].end - attempts[0].start)


def add_recoveries(records: Sequence[Any], last: Sequence[Attempt]) -> None:
    """Fill in the seconds from each fault to the next step that was done, unless another fault came before."""
    following = [record.attempt for record in records[1:]] + list(last[:1])
    for record, after in zip(records, following, strict=True):
        source = record.attempt if record.fault.kind == kinds.DAMAGE else after
        if record.attempt.struck is not None and (steps := source.steps()):
            record.recovery_s = steps[0][0] - record.attempt.struck


def table(records: Sequence[Any]) -> str:
    """One line per kind of fault."""
    lines = [
        "| fault | times | steps lost | most at once | recovery s, median | most | corrupt loads |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind in kinds.KINDS:
        if some := [record for record in records if record.fault.kind == kind]:
            times = [record.recovery_s for record in some if record.recovery_s is not None]
            seconds = f"{statistics.median(times):.1f} | {max(times):.1f}" if times else "- | -"
            lost = [record.lost for record in some]
            corrupt = sum(bool(record.corrupt) for record in some)
            lines.append(f"| {kind} | {len(some)} | {sum(lost)} | {max(lost)} | {seconds} | {corrupt} |")
    return "\n".join(lines)


def rows(result: dict[str, Any], records: Sequence[Any], stock: Sequence[Any]) -> list[Row]:
    """Claims with what was measured, what it is compared with, and the limit that must hold."""
    signals = [record for record in records if record.fault.kind in kinds.SIGNALS]
    kills = [record for record in records if record.fault.kind in kinds.KILLS]
    after_writes = [after for before, after in pairwise(records) if before.fault.kind == kinds.KILL_IN_WRITE]
    times = [record.recovery_s for record in records if record.recovery_s is not None]
    most = max((record.lost for record in kills), default=0)
    undisturbed = f"undisturbed run of the same steps: {result['ettr_undisturbed']}"
    return [
        _at_most(f"corrupt loads or commits after {result['faults']} faults in one run", len(result["corrupt"]), 0),
        Row(
            "last checkpoint and adapter bitwise equal to the undisturbed run's",
            result["ends_equal"],
            limit=True,
            goal=True,
            at_least=True,
        ),
        _at_most(
            f"resumes that fail after {len(after_writes)} kills amid a write",
            sum(bool(record.corrupt or record.wrong) for record in after_writes),
            0,
            _stock_text(stock),
        ),
        _at_most(f"steps lost to {len(signals)} signals", sum(record.lost for record in signals), 0),
        _at_most(f"most steps lost to one of {len(kills)} kills and hangs", most, EVERY_STEPS, "steps between saves"),
        _at_most("what else went wrong", len(result["wrong"]), 0),
        Row("seconds from a fault to the next step, median", round(statistics.median(times), 1) if times else None),
        Row("ETTR, from what the ranks said", result["ettr"], anchor=undisturbed),
        _at_most(
            "per cent by which the run's ledger misses the wall time of all attempts",
            round(100 * abs(result["wall_s_of_ledger"] / result["wall_s"] - 1), 2),
            1,
            f"{result['wall_s']} s by another clock",
        ),
        Row(
            "steps lost, from the run's ledger", result["lost_steps_of_ledger"], anchor=f"seen: {result['lost_steps']}"
        ),
    ]


def _at_most(claim: str, ours: float, limit: int, anchor: str | None = None) -> Row:
    return Row(claim, ours, anchor, limit, goal=limit)


def _stock_text(stock: Sequence[Any]) -> str:
    """What became of stock DeepSpeed under the same fault."""
    cases = [
        f"rank {case.rank} killed, persistence threshold {case.threshold}: latest names {case.latest}, "
        + ("resumes" if case.resumed else "resume fails")
        for case in stock
    ]
    return f"stock DeepSpeed, {sum(not case.resumed for case in stock)} of {len(stock)} fail ({'; '.join(cases)})"


def told(result: dict[str, Any]) -> str:
    """The result for a person."""
    operations = ", ".join(f"{number} on rank {rank}" for rank, number in enumerate(result["operations_of_a_save"]))
    lines = [
        result["table"],
        "",
        f"{result['faults']} faults, {result['attempts']} attempts in {result['wall_s']:.0f} s, "
        f"all in all {result['drill_s']:.0f} s, on {result['machine']}",
        f"operations of a save, each of them once the moment of a kill: {operations}; full disk: {result['full_disk']}",
        f"ETTR {result['ettr']} (from the run's ledger {result['ettr_of_ledger']}, undisturbed "
        f"{result['ettr_undisturbed']}); of a toy model on a CPU: a check of the harness, not a claim about a cluster",
        *(f"CORRUPT: {text}" for text in result["corrupt"]),
        *(f"WRONG: {text}" for text in result["wrong"]),
        "",
        *(f"{VERDICTS[row['holds']]}  {row['claim']}: {row['ours']}" for row in result["rows"]),
    ]
    return "\n".join(lines)
