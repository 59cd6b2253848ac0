"""What a job asks of Slurm: the `slurm` section of the launchers. What reaches a batch file is validated here."""

import re
from typing import Annotated, Final, Self

from pydantic import AfterValidator, Field, model_validator

from ccmdist.config.settings import Settings

NAME: Final = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,63}", re.ASCII)
HOSTS: Final = re.compile(r"[A-Za-z0-9._\[][A-Za-z0-9._,\[\]-]{0,255}", re.ASCII)
FEATURES: Final = re.compile(r"[A-Za-z0-9._(\[][A-Za-z0-9._&|,*()\[\]-]{0,127}", re.ASCII)
MAX_COMMENT: Final = 128


def _checked(value: str, pattern: re.Pattern[str], expected: str) -> str:
    # An empty text is a field that was left out; fullmatch, unlike $, lets no newline through at the end.
    if value and not pattern.fullmatch(value):
        raise ValueError(f"{value!r} is not {expected}")
    return value


def _name(value: str) -> str:
    return _checked(value, NAME, "a name: up to 64 of A-Z a-z 0-9 . _ - and no dash at the start")


def _names(value: str) -> str:
    for part in value.split(",") if value else ():
        if not part:
            raise ValueError(f"{value!r} is not a list of names with one comma between two")
        _name(part)
    return value


def _hosts(value: str) -> str:
    return _checked(value, HOSTS, "a list of nodes such as n1,n[3-5]")


def _features(value: str) -> str:
    return _checked(value, FEATURES, "a combination of features such as a100&nvlink")


def _comment(value: str) -> str:
    if len(value) > MAX_COMMENT or not value.isprintable() or "\\" in value or value.startswith("-"):
        raise ValueError(
            f"{value!r} is not a comment: up to {MAX_COMMENT} printable characters on one line, "
            "no backslash and no dash at the start"
        )
    return value


Name = Annotated[str, AfterValidator(_name)]
Names = Annotated[str, AfterValidator(_names)]
Hosts = Annotated[str, AfterValidator(_hosts)]
Features = Annotated[str, AfterValidator(_features)]
Comment = Annotated[str, AfterValidator(_comment)]


class SlurmSettings(Settings):
    """`slurm.` of `python launch/STAGE.py`: the resources of one job, or of each array task. An empty text is unset."""

    job_name: Name = ""
    """By default ccmdist-STAGE. Everybody on the cluster can read it: never name a job after a patient."""
    nodes: int = Field(1, ge=1, le=4096)
    """Of a training job, or of each array task."""
    tasks_per_node: int | None = Field(None, ge=1, le=256)
    """Processes per node, each with one GPU; by default as many as GPUs."""
    gpus_per_node: int | None = Field(None, ge=0, le=64)
    """By default as many as tasks, or 1 if neither is said; 0 asks for none."""
    gpu_type: Name = ""
    """Kind of GPU as the cluster names it, such as a100."""
    cpus_per_task: int = Field(4, ge=1, le=1024)
    """Cores of each process: itself, its loader workers and a spare one."""
    mem_gb: int | None = Field(None, ge=0, le=65536)
    """Host memory per node; 0 is all of it, and without a value the cluster decides."""
    time_limit_min: int = Field(24 * 60, ge=1, le=365 * 24 * 60)
    """After this a job is stopped, and comes back by itself as long as each start brings something new.

    Any length will do. Submitit, left to itself, would treat every signal to a job of 10 minutes or less as its time
    limit and stop requeueing after a few; here its handler is never reached once a stage runs, and the requeue is ours.
    """
    signal_lead_s: int = Field(300, ge=1, le=65535)
    """Seconds before the time limit, or of a preemption's grace, in which to finish a step and commit; Slurm's own
    clock may send the signal up to 60 s earlier. `ccmdist doctor` compares it with the measured time of a save."""
    partition: Names = ""
    account: Name = ""
    qos: Name = ""
    reservation: Name = ""
    constraint: Features = ""
    """Features that nodes must have."""
    exclude: Hosts = ""
    """Nodes to avoid."""
    comment: Comment = ""
    """Everybody on the cluster can read it."""
    nice: int | None = Field(None, ge=0, le=2_000_000_000)
    """By how much the job's priority is lowered; without a value, that of `select` is, by 1000."""
    max_array_tasks: int = Field(16, ge=1, le=4000)
    """Array tasks of a stage at most; fewer when there is less to do. Clusters commonly allow up to 1000."""

    @model_validator(mode="after")
    def _one_gpu_per_task(self) -> Self:
        if self.num_gpus_per_node and self.num_gpus_per_node != self.num_tasks_per_node:
            raise ValueError(
                f"tasks_per_node {self.tasks_per_node} and gpus_per_node {self.gpus_per_node} must be equal: a process "
                "drives one GPU; give one of the two, or gpus_per_node=0 for none"
            )
        if self.gpu_type and not self.num_gpus_per_node:
            raise ValueError(f"gpu_type {self.gpu_type!r} is asked for with gpus_per_node=0")
        return self

    @model_validator(mode="after")
    def _signal_comes_before_the_end(self) -> Self:
        if self.signal_lead_s >= 60 * self.time_limit_min:
            raise ValueError(
                f"signal_lead_s {self.signal_lead_s} must be shorter than time_limit_min {self.time_limit_min}, "
                f"which is {60 * self.time_limit_min} s"
            )
        return self

    @property
    def num_gpus_per_node(self) -> int:
        """GPUs that a job asks for on each of its nodes."""
        given = self.gpus_per_node if self.gpus_per_node is not None else self.tasks_per_node
        return 1 if given is None else given

    @property
    def num_tasks_per_node(self) -> int:
        """Processes on each node; on a node whose GPUs are all taken, one for each of them."""
        return self.tasks_per_node or max(self.num_gpus_per_node, 1)
