"""Who this process is: the only place that reads SLURM_* and RANK variables.

The vocabulary: ``global_rank`` of ``world_size`` processes, ``local_rank`` on its node; and for work that is
split without talking to each other, ``worker_index`` of ``num_workers``, over all tasks of a Slurm array.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ccmdist.errors import RunError

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
SLURM_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")
FIRST_RESERVED_STEP = 0xFFFFFFF0
"""Steps from here on are none that srun has started tasks in: batch scripts, the shell of `salloc` (slurm/slurm.h)."""


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those that train together."""

    global_rank: int
    local_rank: int
    world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.global_rank == 0


def common_ranks_per_node(local_ranks: Sequence[int]) -> int | None:
    """How many consecutive ranks every node has, or None if nodes differ or their ranks are not consecutive.

    Args:
        local_ranks: Of all ranks, in the order of global ranks.
    """
    count = max(local_ranks) + 1
    return count if list(local_ranks) == list(range(count)) * (len(local_ranks) // count) else None


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks | None:
    """The ranks that a launcher or srun has set, or None if nobody started this process as one of several.

    Raises:
        RunError: If only some of the variables of a launcher are set, or they contradict each other.
    """
    if found := _complete(LAUNCHER_VARIABLES, environment, "unset them, or set all three"):
        return found
    # Inside a batch script, or after `salloc`, SLURM_NTASKS is set but no task has been started by srun.
    if "SLURM_PROCID" not in environment or not _is_step_of_srun(environment.get("SLURM_STEP_ID", "")):
        return None
    # A single task, such as an interactive shell of srun, has nobody to find.
    found = _complete(SLURM_VARIABLES, environment, "start the tasks with srun, one per GPU")
    return found if found is not None and found.world_size > 1 else None


def _is_step_of_srun(step_id: str) -> bool:
    return step_id.isdecimal() and int(step_id) < FIRST_RESERVED_STEP


@dataclass(frozen=True)
class Job:
    """The Slurm job around this process.

    Attributes:
        job_id: Of the job, or of the array that the job is a task of.
        array_task: Number of the task in its array; "" for a job that is not part of one.
        restart_count: How often Slurm has started it again.
    """

    job_id: str
    array_task: str
    restart_count: int


def job_from_environment(environment: Mapping[str, str] = os.environ) -> Job | None:
    """The Slurm job around this process, or None."""
    job_id = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
    if not job_id:
        return None
    return Job(job_id, environment.get("SLURM_ARRAY_TASK_ID", ""), int(environment.get("SLURM_RESTART_COUNT", 0)))


def gpus_from_environment(environment: Mapping[str, str] = os.environ) -> str:
    """The GPUs that Slurm has given this process, such as "0,1"; "" if none, or without Slurm."""
    given = environment.get("CUDA_VISIBLE_DEVICES", "") if "SLURM_JOB_ID" in environment else ""
    return "" if given == "NoDevFiles" else given


def rendezvous_from_environment(environment: Mapping[str, str] = os.environ) -> str:
    """Where ranks that a launcher or srun has started find each other.

    Raises:
        RunError: If nobody has said on which host.
    """
    if not environment.get("MASTER_ADDR") or not environment.get("MASTER_PORT"):
        raise RunError(
            "environment: MASTER_ADDR and MASTER_PORT are not both set, so the ranks cannot find each other",
            'in the batch script: export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) '
            "MASTER_PORT=$((10000 + SLURM_JOB_ID % 15000))",
        )
    return "env://"


def _complete(names: tuple[str, str, str], environment: Mapping[str, str], remedy: str) -> Ranks | None:
    values = {name: environment[name] for name in names if environment.get(name)}
    if not values:
        return None
    if missing := [name for name in names if name not in values]:
        raise RunError(f"environment: {', '.join(values)} set but not {', '.join(missing)}", remedy)
    try:
        ranks = Ranks(*(int(values[name]) for name in names))
    except ValueError:
        raise RunError(f"environment: {values} are not whole numbers", remedy) from None
    if not 0 <= ranks.global_rank < ranks.world_size:
        raise RunError(
            f"environment: {names[0]} {ranks.global_rank} is not below {names[2]} {ranks.world_size}", remedy
        )
    return ranks


def worker_from_environment(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """``(worker_index, num_workers)`` of a process in an array of independent workers; (0, 1) when alone.

    A worker is one process (one GPU): index = array_task x tasks_per_array_task + procid.

    Raises:
        RunError: If the array's tasks are not numbered without gaps: some work would then be nobody's.
    """
    ranks = ranks_from_environment(environment) or Ranks(0, 0, 1)
    first = int(environment.get("SLURM_ARRAY_TASK_MIN", 0))
    array_task = int(environment.get("SLURM_ARRAY_TASK_ID", first)) - first
    num_array_tasks = int(environment.get("SLURM_ARRAY_TASK_COUNT", 1))
    if (
        last := int(environment.get("SLURM_ARRAY_TASK_MAX", first + num_array_tasks - 1))
    ) - first + 1 != num_array_tasks:
        raise RunError(
            f"environment: the array has {num_array_tasks} tasks from {first} to {last}, expected no gap between them",
            f"submit it as --array=0-{num_array_tasks - 1}; any number of tasks does what is left",
        )
    return array_task * ranks.world_size + ranks.global_rank, num_array_tasks * ranks.world_size
