"""One training run under many faults: nothing corrupt is ever loaded, and it ends with the weights of a clean run.

make drill, or: python benchmarks/crash_drill.py [--faults 30] [--seed 0] [--ranks 2] [--json]

Real DeepSpeed ZeRO-3 ranks over gloo train the tiny model, first undisturbed, then under seeded random faults: stop
signals, kills at steps, inside saves and inside writes, full disks, damaged checkpoints, hung ranks. After each the
same command is started again, as a requeue would. Every checkpoint that is committed on the way is compared with that
of the undisturbed run, tensor by tensor. The exit code is 1 if anything differs.
"""

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from drill import faults as kinds
from drill.attempt import Attempt, Order, run_attempt
from drill.disk import SmallDisk, small_disk
from drill.evidence import adapter_digests, committed_steps, damage, digests, newest_step
from drill.faults import Fault, planned_faults
from drill.stock import stock_cases
from drill.summary import add_recoveries, effective_share, rows, table, told
from drill.world import EVERY_STEPS, SETTINGS, data_overrides, make_world

from ccmdist.cluster.ledger import read_ledger
from ccmdist.cluster.run_directory import MAX_ATTEMPTS_WITHOUT_PROGRESS, RunDirectory
from ccmdist.config.loading import load, resolved
from ccmdist.config.train import TrainConfig
from ccmdist.diagnostics.goodput import goodput

PRELOADED = [
    "ccmdist.console",
    "torch",
    "deepspeed",
    "diffusers.models.transformers.transformer_qwenimage",
    "ccmdist.jobs.train_rank",
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "GLOO_SOCKET_IFNAME": "lo",
    "DS_ACCELERATOR": "cpu",
}
RESULTS = Path(__file__).parent / "results" / "crash_drill.json"
MAX_ATTEMPTS_TO_END = 5
STEPS_PER_FAULT = 2.5
STEPS_FOR_OPERATIONS = 60


@dataclass
class Record:
    """What one fault did.

    Attributes:
        fault: The fault.
        attempt: The attempt that suffered it.
        committed: Step of the newest checkpoint after it.
        lost: Steps that had been done and must be done again.
        recovery_s: Seconds from the fault to the next step that was done, or None if another fault came before.
        corrupt: State that was loaded or committed and differs from the undisturbed run's.
        wrong: Anything else that must not have happened.
    """

    fault: Fault
    attempt: Attempt
    committed: int
    lost: int
    recovery_s: float | None = None
    corrupt: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass
class Reference:
    """What the undisturbed run held at every step, and how long it took.

    Attributes:
        digests: Step -> digests of everything in its checkpoint.
        curves: Step -> loss and gradient norm as they were logged.
        adapter: Digests of the exported files.
        attempt: The undisturbed attempt.
        slices_bytes: Size of a rank's part of a checkpoint.
    """

    digests: dict[int, dict[str, str]]
    curves: dict[int, str]
    adapter: dict[str, str]
    attempt: Attempt
    slices_bytes: int


class Drill:
    """A run, its reference, and the faults it has suffered."""

    def __init__(self, folder: Path, disk: SmallDisk | None, num_ranks: int, num_steps: int) -> None:
        self.folder, self.disk, self.num_ranks, self.num_steps = folder, disk, num_ranks, num_steps
        self.run = folder / "disk" / "drilled"
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)
        self.attempts: list[Attempt] = []
        self.records: list[Record] = []
        self._seen: set[int] = set()
        self._corrupt: list[str] = []
        child = self.context.Process(target=make_world, args=(str(folder),))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit("the world to train in could not be made; its own lines say why")
        self._job(self.run, EVERY_STEPS, keep=2)
        self.reference = self._reference()

    def _job(self, run: Path, every_steps: int, keep: int) -> Path:
        """The file from which the ranks of ``run`` take their settings."""
        often = [f"checkpoint.every_steps={every_steps}", f"checkpoint.keep={keep}", f"num_steps={self.num_steps}"]
        config = load(TrainConfig, [], [f"run={run}", *data_overrides(self.folder), *SETTINGS, *often])
        job = self.folder / f"{run.name}.json"
        job.write_text(json.dumps({"settings": resolved(config), "allowed_changes": []}))
        return job

    def _reference(self) -> Reference:
        """Train undisturbed, with a checkpoint at every step."""
        run = self.folder / "undisturbed"
        order = Order(self._job(run, 1, keep=self.num_steps), self.folder / "undisturbed.log", self.num_ranks)
        attempt = run_attempt(self.context, order, lambda _: None)
        found = {step: digests(path) for step, path in committed_steps(run).items()}
        curves = {step: values for _, step, values in attempt.steps()}
        ended = attempt.exit_codes == [0] * self.num_ranks and RunDirectory(run).exit_code() == 0
        if not ended or not len(found) == len(curves) == self.num_steps:
            raise SystemExit(f"the undisturbed run failed; see {order.log}")
        slices_bytes = min(path.stat().st_size for path in committed_steps(run)[1].glob("*.safetensors"))
        shutil.rmtree(run / "checkpoints")
        return Reference(found, curves, adapter_digests(run), attempt, slices_bytes)

    def suffer(self, fault: Fault) -> Record:
        """Start the run once more and let the fault strike."""
        start = newest_step(self.run)
        if start + kinds.MAX_OFFSET + EVERY_STEPS > self.num_steps:
            raise SystemExit(f"the run is at step {start} of {self.num_steps}, too near its end for {fault}")
        self._corrupt = []
        damaged = ""
        if fault.kind == kinds.DAMAGE and start:
            damaged = damage(committed_steps(self.run)[start], fault.action, fault.fraction)
        attempt = self._attempt(self._order(fault, start), lambda a: self._look(a, fault))
        if self.disk:
            self.disk.free()
        if fault.kind == kinds.DAMAGE and attempt.first_step is not None:
            attempt.struck = attempt.start
        elif fault.kind == kinds.FULL_DISK:
            attempt.struck = attempt.end
        committed = newest_step(self.run)
        done = max([start, *(step for _, step, _ in attempt.steps())])
        lost = start - (attempt.first_step or 0) if damaged else done - committed
        record = Record(fault, attempt, committed, lost, corrupt=self._corrupt)
        if damaged and attempt.first_step == start:
            record.corrupt.append(f"step {start} was loaded though {damaged} had been damaged ({fault.action})")
        if not damaged and attempt.first_step not in (None, start):
            record.wrong.append(f"went on from step {attempt.first_step} though {start} was committed")
        record.wrong += wrong_ends(record, RunDirectory(self.run))
        self.records.append(record)
        return record

    def suffer_every_operation(self, rank: int) -> int:
        """Kill ``rank`` at the first operation of a save, the second, ... until a save comes through; how many."""
        for number in count(1):
            fault = Fault(kinds.KILL_OPERATION, rank, "sigkill", "checkpoint.begin", operation=number)
            record = self.suffer(fault)
            tell(record)
            if record.attempt.said("checkpoint committed"):
                return number - 1
        raise AssertionError("count() does not end")

    def finish(self) -> list[Attempt]:
        """Start the run until it says that it is done; the attempts."""
        attempts = []
        for _ in range(MAX_ATTEMPTS_TO_END):
            self._corrupt = []
            order = Order(self.folder / "drilled.json", self._log(), self.num_ranks)
            attempts.append(self._attempt(order, self._compare))
            self.records[-1].corrupt += self._corrupt
            if attempts[-1].exit_codes == [0] * self.num_ranks and RunDirectory(self.run).exit_code() == 0:
                return attempts
        raise SystemExit(f"the drilled run does not end; see {self.folder}")

    @property
    def ends_equal(self) -> bool:
        """Whether the last checkpoint and the adapter are bitwise those of the undisturbed run."""
        last = digests(committed_steps(self.run)[self.num_steps])
        return last == self.reference.digests[self.num_steps] and adapter_digests(self.run) == self.reference.adapter

    def _order(self, fault: Fault, start: int) -> Order:
        variable = fault.variable(start, EVERY_STEPS, self.num_ranks)
        limit, signal_at = {}, None
        if fault.kind == kinds.KILL_IN_WRITE:
            size = self.reference.slices_bytes
            limit = {fault.rank or 0: int(size * (0.2 + 0.79 * fault.fraction))}
        if fault.kind in (kinds.KILL_ANYTIME, kinds.SIGNAL_ANYTIME):
            ranks = list(range(self.num_ranks)) if fault.rank is None else [fault.rank]
            number = signal.Signals[fault.action.upper()]
            signal_at = (fault.fraction * self._seconds_to_steps(kinds.MAX_OFFSET), number, ranks)
        if fault.kind == kinds.FULL_DISK and self.disk is None:
            variable = f"enospc@checkpoint.write:rank=0,step={(start // EVERY_STEPS + 1) * EVERY_STEPS};{variable}"
        if fault.kind == kinds.FULL_DISK and self.disk and fault.action == "before the start":
            self.disk.fill(self._free_bytes(fault))
        return Order(self.folder / "drilled.json", self._log(), self.num_ranks, variable, limit, signal_at)

    def _attempt(self, order: Order, look: Any) -> Attempt:
        attempt = run_attempt(self.context, order, look)
        self.attempts.append(attempt)
        self._compare(attempt)
        for _, step, values in attempt.steps():
            if values != self.reference.curves[step]:
                self._corrupt.append(f"step {step} has {values}, undisturbed {self.reference.curves[step]}")
        return attempt

    def _look(self, attempt: Attempt, fault: Fault) -> None:
        self._compare(attempt)
        late = fault.kind == kinds.FULL_DISK and fault.action == "after a step"
        if late and self.disk and attempt.steps() and attempt.struck is None:
            attempt.struck = time.monotonic()
            self.disk.fill(self._free_bytes(fault))

    def _compare(self, attempt: Attempt) -> None:
        """Compare checkpoints that have appeared with those of the undisturbed run."""
        for step, path in committed_steps(self.run).items():
            if (step, path.stat().st_ino) not in self._seen:
                self._seen.add((step, path.stat().st_ino))
                try:
                    same = digests(path) == self.reference.digests[step]
                except FileNotFoundError:
                    continue  # old, and removed meanwhile
                except Exception as error:
                    same = False
                    self._corrupt.append(f"step {step} cannot be read: {error}")
                if not same:
                    self._corrupt.append(f"the checkpoint of step {step} differs from the undisturbed run's")

    def _log(self) -> Path:
        return self.folder / f"attempt-{len(self.attempts):03d}.log"

    def _free_bytes(self, fault: Fault) -> int:
        return int(fault.fraction * 1.5 * self.num_ranks * self.reference.slices_bytes)

    def _seconds_to_steps(self, steps: int) -> float:
        undisturbed = self.reference.attempt
        return undisturbed.steps()[steps - 1][0] - undisturbed.start


def wrong_ends(record: Record, run: RunDirectory) -> list[str]:
    """What must not be in how an attempt ended.

    A signal puts the run back; but one that comes when the last attempts, this one among them, have all begun where it
    ends must say that they bring nothing new.
    """
    fault, attempt, outcome = record.fault, record.attempt, run.outcome()
    begun = [one["first_step"] for one in run.attempts()[-MAX_ATTEMPTS_WITHOUT_PROGRESS:]]
    is_stuck = begun == [record.committed] * MAX_ATTEMPTS_WITHOUT_PROGRESS
    expected = "refused" if fault.kind in kinds.SIGNALS and is_stuck else "requeue"
    wrong = []
    if fault.kind in kinds.SIGNALS:
        if record.lost:
            wrong.append(f"{record.lost} steps lost to a signal")
        if any(attempt.exit_codes) or outcome is None or outcome.state != expected:
            wrong.append(f"a signal ended with {attempt.exit_codes} and {outcome}")
    if attempt.first_step is None and fault.kind not in (kinds.KILL_ANYTIME, kinds.SIGNAL_ANYTIME, kinds.FULL_DISK):
        wrong.append("the run did not come as far as training")
    if attempt.struck is None:
        wrong.append("the fault did not strike")
    may_refuse = fault.kind == kinds.FULL_DISK or expected == "refused"
    if not may_refuse and outcome is not None and outcome.state == "refused":
        wrong.append(f"the run refuses to go on: {outcome.reason}")
    if fault.kind == kinds.HANG and not attempt.said(f"hang: rank {fault.rank} does not answer"):
        wrong.append(f"nobody names the hung rank {fault.rank}")
    if attempt.fell_silent:
        wrong.append("all ranks hang and nobody ends them")
    return wrong


def tell(record: Record) -> None:
    """One line about a fault, while the drill goes on."""
    attempt = record.attempt
    print(
        f"{record.fault}: from step {attempt.first_step}, committed {record.committed}, lost {record.lost}, "
        f"exit codes {attempt.exit_codes}, {attempt.end - attempt.start:.1f} s "
        + "; ".join(record.corrupt + record.wrong),
        flush=True,
    )


def drill(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run everything in ``folder``; the result as it is written to a file."""
    start = time.monotonic()
    num_steps = math.ceil(STEPS_PER_FAULT * arguments.faults + STEPS_FOR_OPERATIONS)
    with small_disk(folder / "disk") as disk:
        drilled = Drill(folder, disk, arguments.ranks, num_steps)
        stock = stock_cases(drilled.context, folder)
        waiting = list(planned_faults(arguments.faults, arguments.ranks, arguments.seed))
        while waiting:
            fault = waiting.pop(0)
            if fault.kind == kinds.DAMAGE and not newest_step(drilled.run):
                waiting.append(fault)  # there is nothing yet that could be damaged
            else:
                tell(drilled.suffer(fault))
        operations = [drilled.suffer_every_operation(rank) for rank in (0, 1)[: arguments.ranks]]
        last = drilled.finish()
        add_recoveries(drilled.records, last)
        ledger = goodput(read_ledger(RunDirectory(drilled.run).ledger), is_alive=False)
        if ledger is None:
            raise SystemExit(f"{drilled.run}: has no ledger")
        attempts = drilled.attempts
        result = {
            "command": f"python benchmarks/crash_drill.py --faults {arguments.faults} --seed {arguments.seed} "
            f"--ranks {arguments.ranks}",
            "machine": machine(),
            "faults": len(drilled.records),
            "attempts": len(attempts),
            "operations_of_a_save": operations,
            "full_disk": "tmpfs" if disk else "injected ENOSPC",
            "drill_s": round(time.monotonic() - start, 1),
            "wall_s": round(attempts[-1].end - attempts[0].start, 1),
            "wall_s_of_ledger": round(ledger.wall_s, 1),
            "lost_steps": sum(record.lost for record in drilled.records),
            "lost_steps_of_ledger": ledger.lost_steps,
            "ettr": round(effective_share(attempts), 3),
            "ettr_of_ledger": round(ledger.share, 3),
            "buckets_of_ledger_s": {name: round(seconds, 1) for name, seconds in ledger.buckets_s.items()},
            "ettr_undisturbed": round(effective_share([drilled.reference.attempt]), 3),
            "corrupt": [text for record in drilled.records for text in record.corrupt],
            "wrong": [text for record in drilled.records for text in record.wrong],
            "ends_equal": drilled.ends_equal,
        }
        result["rows"] = [row.as_json() for row in rows(result, drilled.records, stock)]
        result["table"] = table(drilled.records)
    return result


def machine() -> str:
    """Where this was measured."""
    import torch

    return f"{os.cpu_count()} CPU cores, no GPU, torch {torch.__version__}, Python {platform.python_version()}"


def main() -> int:
    """Run the drill, print its table, write its rows; 0 if all of them hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--faults", type=int, default=30, help="random faults, besides one at every operation of a save"
    )
    parser.add_argument("--seed", type=int, default=0, help="equal seeds draw equal faults")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, not as a table")
    parser.add_argument("--keep", type=Path, help="work in this new folder and leave it there")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    with contextlib.ExitStack() as stack:
        if arguments.keep:
            if arguments.keep.exists():
                parser.error(f"{arguments.keep} exists already; name a new folder")
            arguments.keep.mkdir(parents=True)
        folder = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ccmdist-drill-")))
        result = drill(arguments, folder.resolve())
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result["rows"], indent=2) + "\n")
    print(json.dumps(result, indent=2) if arguments.json else told(result))
    return int(any(row["holds"] is False for row in result["rows"]))


if __name__ == "__main__":
    sys.exit(main())
