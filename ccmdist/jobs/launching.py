"""As which jobs a stage is submitted, how large each is and why; and submitting them, or showing what would be.

Imports no torch: this runs on a login node.
"""

import dataclasses
import importlib
import math
import shlex
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.submit import BatchJob, batch_text, outside_of_any_job, refuse_without_slurm, submit
from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.select import SelectConfig
from ccmdist.config.settings import Settings
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.stages import result_folder
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.errors import RunError
from ccmdist.jobs.job import snapshot
from ccmdist.jobs.submitted import SubmittedStage

LOW_PRIORITY: Final = 1000
"""By how much the priority of a selection is lowered, unless the settings say otherwise."""


@dataclass(frozen=True)
class Request:
    """A job to submit.

    Attributes:
        stage: Name of the stage.
        config: Its settings.
        slurm: What the job, or each of its array tasks, asks for.
        num_array_tasks: 1 for a job that is no array; 0 if there is nothing to do.
        why: How that number came about.
        options: Further words of the stage's command.
    """

    stage: str
    config: Settings
    slurm: SlurmSettings
    num_array_tasks: int
    why: str
    options: tuple[str, ...] = ()

    def job(self, folder: Path, after: tuple[str, ...]) -> BatchJob:
        """The job, with its snapshot in ``folder``."""
        is_collective = isinstance(self.config, TrainConfig)
        return BatchJob(self.stage, JobFolder(folder), self.slurm, self.num_array_tasks, is_collective, after)

    @property
    def shape(self) -> str:
        """Array tasks, nodes and processes in words."""
        slurm = self.slurm
        array = f"{self.num_array_tasks} array tasks of " if self.num_array_tasks > 1 else ""
        gpu = " with a GPU each" if slurm.num_gpus_per_node else ""
        return f"{array}{_told(slurm.nodes, 'node')} x {_told(slurm.num_tasks_per_node, 'process')}{gpu}"


def _told(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    return f"{number} {what}{'es' if what.endswith('s') else 's'}"


def described(stage: str, config: Settings, slurm: SlurmSettings) -> str:
    """What the stage would do, as its own dry run tells it.

    Raises:
        CcmdistError: If it would refuse to start, which is better known before the job has waited in the queue.
    """
    if isinstance(config, TrainConfig):
        config = config.model_copy(update={"processes": _workers(slurm)})
    text: str = importlib.import_module(f"ccmdist.jobs.{stage}").describe(config)
    return text


def train_jobs(config: TrainConfig, slurm: SlurmSettings, options: tuple[str, ...] = ()) -> list[Request]:
    """One job, whose processes train together."""
    return [Request("train", config, slurm, 1, f"{config.num_steps} steps", options)]


def precompute_jobs(config: PrecomputeConfig, slurm: SlurmSettings) -> list[Request]:
    """One array, with a worker for every shard that is not encoded yet."""
    return [_array("precompute", config, slurm, "shards to encode")]


def synthesize_jobs(config: SynthesizeConfig, slurm: SlurmSettings) -> list[Request]:
    """One array, with a worker for every batch that is not drawn yet."""
    return [_array("synthesize", config, slurm, "batches to draw")]


def evaluate_jobs(config: EvaluateConfig, slurm: SlurmSettings) -> list[Request]:
    """An array that does the units of work, with GPUs where networks run, and after it one process that compares."""
    if slurm.gpus_per_node is None and not config.runs_networks:
        slurm = slurm.model_copy(update={"gpus_per_node": 0})  # nothing in it would run on one
    measure = _array("evaluate", config, slurm, "units of work open")
    alone = slurm.model_copy(update={"nodes": 1, "tasks_per_node": 1, "gpus_per_node": 0})
    report = Request("evaluate", config, alone, 1, "compares what is measured, and writes the report")
    if measure.num_array_tasks * _workers(slurm) == 1:
        # Alone, a process would not know itself as one of several: it measures and reports at once.
        return [dataclasses.replace(measure, why=f"{measure.why}: one process measures and writes the report")]
    return [measure, report]


def select_jobs(config: SelectConfig, slurm: SlurmSettings) -> list[Request]:
    """One array of low priority, with a worker for every checkpoint that is not drawn and measured yet."""
    if slurm.nice is None:
        slurm = slurm.model_copy(update={"nice": LOW_PRIORITY})  # nobody waits for it, and it loses nothing by waiting
    return [_array("select", config, slurm, "checkpoints to draw with")]


def _array(stage: str, config: Settings, slurm: SlurmSettings, what: str) -> Request:
    open_units = importlib.import_module(f"ccmdist.jobs.{stage}").open_units(config)
    wanted = math.ceil(open_units / _workers(slurm))
    most = f", but max_array_tasks is {slurm.max_array_tasks}" if wanted > slurm.max_array_tasks else ""
    why = f"{open_units} {what}, {_told(_workers(slurm), 'worker')} in each array task{most}"
    return Request(stage, config, slurm, min(wanted, slurm.max_array_tasks), why)


def _workers(slurm: SlurmSettings) -> int:
    return slurm.nodes * slurm.num_tasks_per_node


def carry_out(
    requests: Sequence[Request], arguments: Sequence[str], is_dry_run: bool, chains: Sequence[Sequence[Request]] = ()
) -> Iterator[str]:
    """Submit the jobs, each to start when the one before it has ended well; what to tell of each.

    Args:
        requests: In order.
        arguments: Of the launcher, kept in the jobs' folders for people to read.
        is_dry_run: Tell the batch files instead, and do nothing.
        chains: Other jobs, each chain in order and all chains at the same time; the first of ``requests`` starts when
            all of them have ended well.

    Raises:
        CcmdistError: If a job cannot be described in a batch file, or Slurm refuses it.
    """
    if not is_dry_run:
        refuse_without_slurm()
    submitted: list[str] = []
    ends: list[str] = []
    for chain in chains:
        ends += yield from _chained(chain, (), submitted, arguments, is_dry_run)
    yield from _chained(requests, tuple(ends), submitted, arguments, is_dry_run)
    if is_dry_run:
        yield "dry run: nothing was done"


def _chained(
    requests: Sequence[Request],
    after: tuple[str, ...],
    submitted: list[str],
    arguments: Sequence[str],
    is_dry_run: bool,
) -> Generator[str, None, tuple[str, ...]]:
    """Submit one after the other, the first after some jobs, and note their ids; for which whoever follows waits."""
    for request in requests:
        shown = result_folder(request.config).absolute() / "jobs" / "NAME"
        text = batch_text(request.job(shown, after))
        if not request.num_array_tasks:
            yield f"{request.stage}: {request.why}; no job is needed"
            continue
        if is_dry_run:
            submitted.append(f"JOB_{len(submitted) + 1}")
            yield f"{request.stage}: {request.shape}; {request.why}\n\n{text}"
        else:
            yield _submitted(request, after, arguments, submitted)
        after = (submitted[-1],)
    return after


def _submitted(request: Request, after: tuple[str, ...], arguments: Sequence[str], submitted: list[str]) -> str:
    """Submit one job after others, and note its id."""
    with outside_of_any_job():
        folder = snapshot(request.stage, request.config, arguments)
    job = request.job(folder, after)
    try:
        job_id = submit(job, SubmittedStage(request.stage, str(folder), request.options))
    except RunError as error:
        if not submitted:
            raise
        raise RunError(str(error), f"submitted before it: {' '.join(submitted)}, which `scancel` ends") from None
    submitted.append(job_id)
    follow = [f"squeue --job {job_id}", f"tail -F {shlex.quote(str(job.log(job_id)))}"]
    if isinstance(request.config, TrainConfig):
        follow.append(f"ccmdist status {shlex.quote(str(request.config.run))} --watch")
    lines = [
        f"{request.stage}: job {job_id}, {request.shape}; {request.why}",
        *(f"  starts after job {one} has ended well" for one in job.after),
        f"  folder  {folder}",
        f"  log     {job.log(job_id)}",
        f"  watch   {'; '.join(follow)}",
        f"  cancel  scancel {job_id}",
    ]
    return "\n".join(lines)
