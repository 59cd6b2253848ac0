"""A real Slurm of several nodes on this machine, and a clone of the project from which jobs are submitted to it."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.distributed.small_world import SETTINGS, data_overrides

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
PACKAGES = "slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge"
PATIENCE_S = 240
UNDER_WAY = {"PENDING", "CONFIGURING", "RUNNING", "SIGNALING", "COMPLETING", "SUSPENDED", "PREEMPTED", "NODE_FAIL"}
ALONE = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1")
TWO_BY_TWO = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
NUM_STEPS = 32
LENGTH = (f"num_steps={NUM_STEPS}", "checkpoint.every_steps=8", "validation.every_steps=16")
NOT_INHERITED = ("SLURM", "SBATCH", "CCMDIST")


def why_not():
    """Why there can be no cluster here; an empty text if there can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if os.geteuid() != 0:
        return "Slurm tests need root"
    return f"Slurm tests need {', '.join(missing)}: apt-get install {PACKAGES}" if missing else ""


def until(condition, what, patience_s=PATIENCE_S):
    """Wait for something that a daemon or a job does; its first true value."""
    deadline = time.monotonic() + patience_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {patience_s} s for {what() if callable(what) else what}"
        time.sleep(0.1)
    return value


def task_pid(job, **variables):
    """Process id, on this machine, of a task that srun started and whose environment says so; nodes count otherwise."""
    said = {name: str(value) for name, value in {"SLURM_STEP_ID": 0, **variables}.items()}

    def find():
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found = process.environ()
                is_ours = (
                    job in (found.get("SLURM_JOB_ID"), found.get("SLURM_ARRAY_JOB_ID"))
                    and said.items() <= found.items()
                )
                if is_ours and process.cmdline()[0].endswith("python3"):
                    return process.pid
        return None

    return until(find, f"a task of {job} with {variables}")


class Cluster:
    """A throw-away cluster, and what a user sees of it."""

    def __init__(self, folder, port, **settings):
        names = {f"SLURM_SANDBOX_{name}": str(value) for name, value in settings.items()}
        ours = {"SLURM_SANDBOX_DIR": str(folder), "SLURM_SANDBOX_PORT": str(port), "SLURM_SANDBOX_ACCOUNTING": "shim"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(NOT_INHERITED)}
        self.folder = folder
        self.environment = inherited | ours | names | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def __enter__(self):
        try:
            self.sandbox("start")
        except BaseException:
            self.__exit__()
            raise
        told = self.run("bash", "-c", f"eval \"$('{ROOT}/slurm/sandbox.sh' env)\" && env -0")
        self.environment |= {
            name: value
            for name, _, value in (line.partition("=") for line in told.split("\0"))
            if name in ("SLURM_CONF", "PATH", "CCMDIST_DEVICE")
        }
        return self

    def __exit__(self, *error):
        self.sandbox("stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def sandbox(self, *words):
        """A command of slurm/sandbox.sh."""
        return self.run(str(ROOT / "slurm" / "sandbox.sh"), *words)

    def run(self, *words, cwd=ROOT, **environment):
        """What a command prints; it has to succeed."""
        done = subprocess.run(
            words, cwd=cwd, env=self.environment | environment, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def states(self, job):
        """State of a job, or of each task of an array."""
        return self.run("squeue", "-h", "-r", "-t", "all", "-j", job, "-o", "%T").split()

    def wait_for(self, job, *states):
        """Wait until the job, and every task of an array, is in one of these states."""

        def arrived():
            found = self.states(job)
            assert set(found) <= {*states, *UNDER_WAY}, f"job {job} is {found}, expected {states}"
            return set(found) <= set(states)

        until(arrived, lambda: f"{states}, job {job} is {self.states(job)}")

    def exit_code(self, job):
        """Of an ended job's batch script."""
        return int(re.search(r"ExitCode=(\d+)", self.run("scontrol", "show", "job", job))[1])

    def restarts(self, job):
        """How often Slurm has started the job again."""
        return int(re.search(r"Restarts=(\d+)", self.run("scontrol", "show", "job", job))[1])

    def wait_until_back(self, job, restarts):
        """Wait until the job was put back into the queue, and spare it the seconds that it has to wait there."""

        def is_back():
            assert set(self.states(job)) <= UNDER_WAY, f"job {job} is {self.states(job)} after {restarts} restarts"
            return self.restarts(job) > restarts and self.states(job) != ["COMPLETING"]

        until(is_back, lambda: f"job {job} to be put back, it is {self.states(job)}")
        # A start in the second in which the last one was ended fails: "Job credential revoked".
        time.sleep(2)
        words = ["scontrol", "update", f"jobid={job}", "starttime=now"]
        subprocess.run(words, env=self.environment, capture_output=True, check=False)

    def batch_node(self, job):
        """Node on which the batch script runs."""
        return self.run("squeue", "-h", "-j", job, "-o", "%B")

    def cut_power(self, node):
        """Let a node die at once; the controller is told, instead of finding out in half a minute."""
        self.sandbox("kill", node)
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def restore_power(self, node):
        """Let the node come back, and jobs onto it once the controller knows: else it counts as lost again."""

        def started():
            return re.search(r"SlurmdStartTime=(\S+)", self.run("scontrol", "show", "node", node))[1]

        before = started()
        self.sandbox("revive", node)
        until(lambda: started() != before, f"node {node} to register")
        self.run("scontrol", "update", f"nodename={node}", "state=resume")


class Project:
    """A clone of the project with a place for logs, in a folder whose name has a space."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder / "a clone"
        ignored = shutil.ignore_patterns("logs", ".*")
        for name in ("slurm", "configs", "launch"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, self.folder / name, ignore=ignored)
        (self.folder / "slurm" / "logs").mkdir()

    def sbatch(self, *words, **environment):
        """Submit with one core per task; the job's id."""
        ours = {"CCMDIST_VENV": sys.prefix, "CCMDIST_NODE_TMP": str(self.folder)}
        words = ["sbatch", "--parsable", "--cpus-per-task=1", *map(str, words)]
        return self.cluster.run(*words, cwd=self.folder, **(ours | environment))

    def train(self, world, folder, *overrides, shape=ALONE, options=(), configs=("tiny",), **environment):
        """Submit a training run by the script that a user submits; the job's id."""
        files = [f"configs/train/{name}.yaml" for name in configs]
        words = [*files, f"run={folder}", *data_overrides(world), *SETTINGS, *overrides]
        return self.sbatch(*shape, *options, "slurm/train.sh", *words, **environment)

    def preempt(self, job):
        """Let a job of the partition high take all nodes, until this one has made way and is back in the queue."""
        words = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 300")
        other = self.sbatch(*words)
        self.cluster.wait_until_back(job, self.cluster.restarts(job))
        self.cluster.run("scancel", other)

    def log(self, job):
        """The log of a job or of an array task such as "12_3"; empty before it begins."""
        found = list((self.folder / "slurm" / "logs").glob(f"*-{job}.out"))
        return found[0].read_text() if found else ""

    def wait_for_line(self, job, pattern, number=1):
        """Wait until the job's log has so many lines with a pattern."""
        until(
            lambda: len(re.findall(pattern, self.log(job))) >= number,
            lambda: f"line {number} of {pattern!r} in the log of {job}:\n{self.log(job)}",
        )
