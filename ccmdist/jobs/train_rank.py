"""One rank of a training run, from its first import to its exit code: under srun, a local launcher, or alone."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from ccmdist.adapters.state import write_adapter
from ccmdist.cluster.job_folder import tell_job
from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.process_group import ProcessGroup, is_lost_connection
from ccmdist.cluster.ranks import Ranks
from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.config.loading import validate
from ccmdist.config.train import TrainConfig
from ccmdist.console import log, start_logging
from ccmdist.errors import EXIT_DONE, EXIT_INTERNAL, EXIT_REFUSED, CcmdistError
from ccmdist.jobs.adapter import adapter_of
from ccmdist.train.checkpoint import newest_valid
from ccmdist.train.loop import train
from ccmdist.train.objectives.edit import EditObjective


def run_rank(job_path: str, ranks: Ranks, rendezvous: str) -> int:
    """Train as one of several ranks; the exit code: 0, 78 for a refusal, 70 for an error of ours."""
    start_logging(ranks.global_rank)
    job = json.loads(Path(job_path).read_text())
    config = validate(TrainConfig, job["settings"], source=job_path)
    torch.set_num_threads(max((os.cpu_count() or 1) // ranks.world_size, 1))
    run = RunDirectory(config.run)
    is_held = False
    with StopFlag(config.forced_exit_s) as stop:
        try:
            group = ProcessGroup(ranks, config.collective_timeout_min, rendezvous)
            if problem := group.from_first(_hold(run, config, frozenset(job["allowed_changes"]), ranks)):
                if ranks.is_first:
                    sys.stderr.write(f"ccmdist train: {problem}\n")
                    tell_job(Outcome("refused", problem, run.committed_step()))
                return EXIT_REFUSED
            is_held = True
            outcome = train(config, EditObjective(config, group), group, run, stop)
            if ranks.is_first:
                _finish(run, config, outcome)
            group.barrier()
            group.close()
        except CcmdistError as error:
            # The same refusal reaches several ranks; one of them tells it.
            if not is_held or run.refuse(str(error)):
                sys.stderr.write(f"ccmdist train: {error}\n")
                tell_job(Outcome("refused", str(error), run.committed_step()))
            return error.exit_code
        except Exception as error:
            if not is_lost_connection(error):
                traceback.print_exc()
            else:
                sys.stderr.write(
                    f"ccmdist train: rank {ranks.global_rank} lost the connection to another rank, whose own lines say "
                    "why; run the same command again to continue from the last checkpoint\n"
                )
            return EXIT_INTERNAL
    return EXIT_DONE


def _hold(run: RunDirectory, config: TrainConfig, allowed_changes: frozenset[str], ranks: Ranks) -> str:
    """Let rank 0 take the run; an empty text, or why it may not."""
    if ranks.is_first:
        try:
            run.hold()
            run.accept(config, allowed_changes)
        except CcmdistError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or config.run}: {error.strerror}; see that it can be written and has space left"
    return ""


def _finish(run: RunDirectory, config: TrainConfig, outcome: Outcome) -> None:
    """Export the adapter of a finished run, then write how the attempt ended."""
    if outcome.state == "done":
        export_adapter(run, config)
    outcome = run.end_attempt(outcome)
    tell_job(outcome)
    log.info("%s at step %d: %s", outcome.state, outcome.step, outcome.reason)
    if outcome.state == "requeue":
        log.info("run the same command again to continue")
    if outcome.state == "done":
        log.info("adapter: %s", run.adapter)
        log.info(
            "curves: tensorboard --logdir %s   (on a cluster, from your own machine: "
            "ssh -L 6006:localhost:6006 LOGIN_NODE, then open http://localhost:6006)",
            run.tensorboard,
        )


def export_adapter(run: RunDirectory, config: TrainConfig) -> None:
    """Write the newest checkpoint's adapter to the run's adapter folder, as stock diffusers loads it."""
    checkpoint = newest_valid(run.checkpoints)
    assert checkpoint is not None, "a finished run has committed its last step"
    write_adapter(run.adapter, adapter_of(checkpoint, config))
