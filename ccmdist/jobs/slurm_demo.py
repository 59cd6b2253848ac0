"""The demo as a user of a cluster runs it: jobs that depend on each other, on a real Slurm of four nodes right here.

Training is preempted by a job of higher priority, and a node loses its power while images are drawn. Nobody helps:
each job comes back by itself, and the chain ends with the same report as the local demo.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rich.console import Console

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.errors import RunError
from ccmdist.jobs.demo import Command, chain, execute, summarise

SANDBOX: Final = Path("slurm/sandbox.sh")
PACKAGES: Final = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
PROGRAMS: Final = ("slurmctld", "slurmd", "munged", "sbatch")
SHAPES: Final = {
    "precompute": ("--array=0-1",),
    "train": ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"),
    "synthesize": ("--array=0-3",),
    "evaluate": (),
}
"""Of each stage's job; what the local demo gives to several workers is an array here too."""
COMMITTED_BEFORE_PREEMPTION: Final = 40
"""Steps of training; a preemption before the first checkpoint would show less."""
SECONDS_BETWEEN_LINES: Final = 10.0
OVER: Final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Submitted:
    """A job of the chain."""

    stage: str
    job: str
    command: Command


class Slurm:
    """The programs of a cluster, as a user calls them."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def __call__(self, *words: str) -> str:
        """What a command prints.

        Raises:
            RunError: If it fails.
        """
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RunError(f"`{shlex.join(words)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def states(self, job: str) -> list[str]:
        """State of the job, or of each task of an array."""
        return self("squeue", "--noheader", "--array", "--states=all", f"--jobs={job}", "--format=%T").split()

    def nodes(self, job: str) -> list[str]:
        """Nodes on which the job, or a task of its array, runs now."""
        running = ("squeue", "--noheader", "--array", "--states=running", f"--jobs={job}", "--format=%N")
        return self(*running).split()


@contextmanager
def sandbox() -> Iterator[Slurm]:
    """A cluster, stopped at the end unless it was there before.

    Raises:
        RunError: If there can be none, saying what is missing.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing or os.geteuid() != 0 or not SANDBOX.is_file():
        raise RunError(
            f"demo: a Slurm of our own needs {SANDBOX}, root" + (f", and {', '.join(missing)}" if missing else ""),
            f"in a clone of the project, as root: apt-get install --no-install-recommends {PACKAGES}",
        )
    slurm = Slurm(os.environ | {"PATH": path, "CCMDIST_VENV": sys.prefix})
    told = slurm(str(SANDBOX), "start")
    variables = slurm("bash", "-c", f'eval "$({SANDBOX} env)" && env -0').split("\0")
    ours = ("SLURM_CONF=", "PATH=", "CCMDIST_DEVICE=")
    slurm.environment |= dict(line.split("=", 1) for line in variables if line.startswith(ours))
    try:
        yield slurm
    finally:
        if not told.startswith("already up"):
            slurm(str(SANDBOX), "stop")


class Demo:
    """One go at the chain."""

    def __init__(self, out: Path, slurm: Slurm, console: Console) -> None:
        self.slurm, self.console = slurm, console
        self.run = RunDirectory(out / "run")
        self.preempted = self.run.committed_step() >= COMMITTED_BEFORE_PREEMPTION
        self.power_cut = False

    def submit(self, commands: list[Command]) -> list[Submitted]:
        """Submit every stage to start when the one before it has ended well."""
        submitted: list[Submitted] = []
        for command in commands:
            stage, arguments = command.words[0], command.words[1:]
            after = (f"--dependency=afterok:{submitted[-1].job}", "--kill-on-invalid-dep=yes") if submitted else ()
            # One core per task: the nodes of the sandbox share those of this machine.
            shape = SHAPES[stage] or (f"--array=0-{command.num_workers - 1}",) * (command.num_workers > 1)
            words = ("sbatch", *shape, "--cpus-per-task=1", *after, f"slurm/{stage}.sh", *arguments)
            self.say(f"$ {shlex.join(words)}")
            submitted.append(Submitted(stage, self.slurm("sbatch", "--parsable", *words[1:]), command))
        return submitted

    def watch(self, jobs: list[Submitted]) -> None:
        """Tell how far the jobs are, disturb them, and wait for their end.

        Raises:
            RunError: If a job did not end well.
        """
        said = ""
        last = 0.0
        while True:
            states = [self.slurm.states(one.job) for one in jobs]
            line = "  ".join(f"{one.stage} {_counted(state)}" for one, state in zip(jobs, states, strict=True))
            if line != said or time.monotonic() - last > SECONDS_BETWEEN_LINES:
                self.say(f"{time.strftime('%H:%M:%S')} {line}{self._progress()}")
                said, last = line, time.monotonic()
            if all(set(state) <= OVER for state in states):
                break
            self._disturb(jobs)
            time.sleep(1)
        for one, state in zip(jobs, states, strict=True):
            if set(state) != {"COMPLETED"}:
                raise RunError(
                    f"demo: {one.stage}, job {one.job}: {_counted(state)}", f"see slurm/logs/*{one.job}*.out"
                )

    def _progress(self) -> str:
        return f"  (step {self.run.committed_step()} committed)" if self.run.checkpoints.exists() else ""

    def _disturb(self, jobs: list[Submitted]) -> None:
        """Do to the jobs what happens on clusters, once each, when they have something to lose."""
        train = next(one for one in jobs if one.stage == "train")
        if not self.preempted and self.run.committed_step() >= COMMITTED_BEFORE_PREEMPTION:
            self.preempted = True
            self._preempt(train)
        for one in jobs:
            is_drawing = one.stage == "synthesize" and re.search(r"batch \d+: ", _log_texts(one.job))
            if is_drawing and not self.power_cut and (nodes := self.slurm.nodes(one.job)):
                self.power_cut = True
                self._cut_power(nodes[0])

    def _preempt(self, train: Submitted) -> None:
        if not self.slurm.nodes(train.job):
            return
        self.say("--- a job of higher priority takes all nodes: training is preempted")
        words = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")
        self.slurm("sbatch", *words)

    def _cut_power(self, node: str) -> None:
        self.say(f"--- node {node} loses its power: what ran on it comes back elsewhere")
        self.slurm(str(SANDBOX), "kill", node)
        self.slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=demo")
        time.sleep(2)
        self.slurm(str(SANDBOX), "revive", node)
        self.slurm("scontrol", "update", f"nodename={node}", "state=resume")

    def say(self, line: str) -> None:
        """Print a line as it is."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)


def run(out: Path) -> None:
    """Run the chain as jobs in ``out``, and print what came out and where it lies.

    Raises:
        RunError: If there can be no Slurm here, or a part of the chain does not end well.
    """
    console = Console()
    commands = chain(out)
    with sandbox() as slurm:
        for command in commands:
            if command.words[0] in ("shards", "model"):
                execute(command, console)
        demo = Demo(out, slurm, console)
        # The local demo calls training twice, to stop it once; a job comes back by itself.
        demo.watch(demo.submit([one for one in commands if one.words[0] in SHAPES and not one.fault]))
        for command in commands:
            if command.words[0] == "adapter":
                execute(command, console)
    summarise(out, console)


def _counted(states: list[str]) -> str:
    """How many tasks are in which state; one state for a job without tasks."""
    found = {state: states.count(state) for state in dict.fromkeys(states)}
    return ", ".join(
        state.lower() if len(states) == 1 else f"{count} {state.lower()}" for state, count in found.items()
    )


def _log_texts(job: str) -> str:
    return "".join(path.read_text(errors="replace") for path in Path("slurm/logs").glob(f"*-{job}*.out"))
