"""The nodes of the Slurm job around this process, and how to start one process on each of them."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from ccmdist.cluster.ranks import job_from_environment
from ccmdist.diagnostics.checks.finding import NoAnswerError, Request, answer

KEPT = ("SLURM_CONF",)
TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Allocation:
    """A job that has nodes.

    Attributes:
        job_id: Slurm's number of it.
        hosts: Names of its nodes, in Slurm's order.
        environment: For srun: without what belongs to the step that this process may itself be a task of.
    """

    job_id: str
    hosts: tuple[str, ...]
    environment: Mapping[str, str]

    def on_each_node(self, module: str, *arguments: str) -> list[str]:
        """The command that runs ``python -m module`` once on every node, beside whatever runs there."""
        tasks = [f"--nodes={len(self.hosts)}", f"--ntasks={len(self.hosts)}", "--ntasks-per-node=1"]
        step = ["srun", f"--jobid={self.job_id}", "--overlap", "--kill-on-bad-exit=1", *tasks]
        return [*step, sys.executable, "-m", module, *arguments]


def allocation(request: Request) -> Allocation | None:
    """The nodes of this job; None outside of one."""
    job_id = request.environment.get("SLURM_JOB_ID")
    if job_from_environment(request.environment) is None or not job_id:
        return None
    try:
        hosts = answer(["scontrol", "show", "hostnames"], TIMEOUT_S, request.environment).split()
    except NoAnswerError:
        return None
    clean = {name: value for name, value in request.environment.items() if not name.startswith(("SLURM_", "PMI"))}
    clean |= {name: request.environment[name] for name in KEPT if name in request.environment}
    return Allocation(job_id, tuple(hosts), {**clean, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))})
