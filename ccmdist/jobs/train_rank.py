"""One rank of a training run, from its first import to its exit code: under srun, a local launcher, or alone."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from ccmdist.adapters.state import write_adapter, write_peft
from ccmdist.cluster.device import is_gpu_usable
from ccmdist.cluster.job_folder import tell_job
from ccmdist.cluster.ledger import Ledger
from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.process_group import ProcessGroup, is_lost_connection
from ccmdist.cluster.ranks import Ranks, job_from_environment
from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.cluster.sections import Sections, job_began
from ccmdist.cluster.watchdog import Watchdog
from ccmdist.config.loading import validate
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.config.train import TrainConfig
from ccmdist.console import log, start_logging
from ccmdist.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_REFUSED, CcmdistError
from ccmdist.jobs.adapter import adapter_of
from ccmdist.jobs.network import network_of
from ccmdist.jobs.train import refuse_missing_libraries
from ccmdist.models.network_state import write_network
from ccmdist.train.checkpoint import newest_valid
from ccmdist.train.llm_adapter import LLM_ADAPTER, llm_adapter
from ccmdist.train.loop import train
from ccmdist.train.objectives.choice import objective_of
from ccmdist.train.sharding import settle_sharding


def run_rank(job_path: str, ranks: Ranks, rendezvous: str) -> int:
    """Train as one of several ranks; the exit code: 0, 78 for a refusal, 70 for an error of ours."""
    start_logging(ranks.global_rank)
    job = json.loads(Path(job_path).read_text())
    config = validate(TrainConfig, job["settings"], source=job_path)
    _share_cores(ranks)
    sections = Sections(job.get("began") or job_began(os.environ))
    return _Rank(config, frozenset(job["allowed_changes"]), ranks, sections).run(rendezvous)


def _share_cores(ranks: Ranks) -> None:
    """Let local ranks take equal parts of the cores, unless somebody, such as a batch script, has said how many."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // ranks.world_size, 1))


class _Rank:
    """One rank; holds what its beginning, its training and its end share."""

    def __init__(self, config: TrainConfig, allowed_changes: frozenset[str], ranks: Ranks, sections: Sections) -> None:
        self.config, self.allowed_changes, self.ranks, self.sections = config, allowed_changes, ranks, sections
        self.folder = RunDirectory(config.run)
        self.ledger = Ledger(self.folder.ledger, sections)
        self.is_held = False

    def run(self, rendezvous: str) -> int:
        """Train; the exit code, after whatever went wrong has been told."""
        watchdog = Watchdog(self.sections, self.config.timeouts, self.ranks, self._flush)
        with StopFlag(self.config.forced_exit_s) as stop, watchdog:
            try:
                return self._train(rendezvous, stop, watchdog)
            except CcmdistError as error:
                return self._refuse(error)
            except Exception as error:
                if not is_lost_connection(error):
                    traceback.print_exc()
                else:
                    self._tell(
                        f"rank {self.ranks.global_rank} lost the connection to another rank, whose own lines say why; "
                        "run the same command again to continue from the last checkpoint"
                    )
                return EXIT_INTERNAL
            finally:
                self._flush()

    def _train(self, rendezvous: str, stop: StopFlag, watchdog: Watchdog) -> int:
        config, ranks, timeouts = self.config, self.ranks, self.config.timeouts
        with self.sections("startup"):
            group = ProcessGroup(ranks, timeouts.collective_min, rendezvous, timeouts.meet_min)
            watchdog.listen(group.store)
            problem = group.from_first(self._hold())
        if problem:
            if ranks.is_first:
                self._tell(problem)
                tell_job(Outcome("refused", problem, self.folder.committed_step()))
            return EXIT_REFUSED
        self.is_held = True
        with self.sections("startup"):
            refuse_missing_libraries(config)
            config = settle_sharding(config, group)
            objective = objective_of(config, group)
        outcome = train(config, objective, group, self.folder, stop, self.ledger)
        with self.sections("checkpoint", outcome.step):
            if ranks.is_first:
                outcome = _finish(self.folder, config, outcome)
            group.barrier()
        group.close()
        self.ledger.end(outcome)
        return EXIT_DONE

    def _hold(self) -> str:
        """Let rank 0 take the run; an empty text, or why it may not."""
        if self.ranks.is_first:
            try:
                self.folder.hold()
                self.folder.accept(self.config, self.allowed_changes)
            except CcmdistError as error:
                return str(error)
            except OSError as error:
                where = error.filename or self.folder.path
                return f"{where}: {error.strerror}; see that it can be written and has space left"
            num_gpus = self.ranks.world_size if is_gpu_usable() else 0
            self.ledger.begin(self.folder.committed_step(), job_from_environment(), self.ranks.world_size, num_gpus)
        return ""

    def _refuse(self, error: CcmdistError) -> int:
        """Tell why the run cannot go on; the same refusal reaches several ranks, and one of them tells it."""
        if error.exit_code != EXIT_REFUSED:
            self._tell(str(error))
            return error.exit_code
        outcome = Outcome("refused", str(error), self.folder.committed_step())
        self.ledger.end(outcome)
        if not self.is_held or self.folder.refuse(str(error)):
            self._tell(str(error))
            tell_job(outcome)
        return EXIT_REFUSED

    def _flush(self) -> None:
        """Write the time that an attempt without an end has spent."""
        self.ledger.flush(self.sections.done)

    def _tell(self, text: str) -> None:
        sys.stderr.write(f"ccmdist train: {text}\n")


def _finish(run: RunDirectory, config: TrainConfig, outcome: Outcome) -> Outcome:
    """Export what a finished run has trained, then write how the attempt ended; the outcome that stands."""
    if outcome.state == "done":
        export(run, config)
    outcome = run.end_attempt(outcome)
    tell_job(outcome)
    log.info("%s at step %d: %s", outcome.state, outcome.step, outcome.reason)
    if outcome.state == "requeue":
        log.info("run the same command again to continue")
    if outcome.state == "done":
        log.info("%s: %s", config.objective.trains, run.trained(config.objective.trains))
        log.info(
            "curves: tensorboard --logdir %s   (on a cluster, from your own machine: "
            "ssh -L 6006:localhost:6006 LOGIN_NODE, then open http://localhost:6006)",
            run.tensorboard,
        )
    return outcome


def export(run: RunDirectory, config: TrainConfig) -> None:
    """Write what the newest checkpoint has trained to the run's folder: an adapter, two, or a network.

    Beside an MDF-MLLM, which holds it too, the adapter of its language model is written as PEFT reads it.
    """
    checkpoint = newest_valid(run.checkpoints)
    assert checkpoint is not None, "a finished run has committed its last step"
    if isinstance(config.objective, DualSettings):
        for name in config.objective.adapters:
            write_adapter(run.adapter / name, adapter_of(checkpoint, config, name))
    elif config.objective.trains == "adapter":
        write_adapter(run.adapter, adapter_of(checkpoint, config))
    else:
        state = network_of(checkpoint, config)
        if isinstance(config.objective, DiagnoseSettings) and (adapter := llm_adapter(state)) is not None:
            write_peft(run.network / LLM_ADAPTER, adapter)
        write_network(run.network, state)
