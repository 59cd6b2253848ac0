"""The training loop: the only one, for every objective, on one process or a thousand.

All that a step does is a function of its number and of the parameters, so a resumed run repeats exactly what an
uninterrupted one does. Once per step, after it, the ranks agree on whether to stop and whether the loss was finite.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch

from ccmdist.cluster.faults import fault_point
from ccmdist.cluster.ledger import Ledger
from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.run_directory import Outcome, RunDirectory
from ccmdist.cluster.sections import Sections
from ccmdist.config.loading import digest
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.data.cache_index import source_set_digest
from ccmdist.errors import CheckpointError, RunError
from ccmdist.train.checkpoint import CheckpointStore
from ccmdist.train.engine import Engine, quiet_libraries, zero_config
from ccmdist.train.monitor import Monitor, StepReport
from ccmdist.train.objectives.objective import Batch, Objective
from ccmdist.train.optim import learning_rate
from ccmdist.train.resume import resume


def train(
    config: TrainConfig, objective: Objective, group: ProcessGroup, run: RunDirectory, stop: StopFlag, ledger: Ledger
) -> Outcome:
    """Train until the last step or a stop signal; how it ended. Collective.

    Raises:
        RunError: If the loss is not finite too often in a row, or state cannot be saved.
        CheckpointError: If the run's checkpoints belong to other weights or data.
    """
    with ledger.sections("startup"):
        quiet_libraries()
        model = objective.build(zero_config(config, group.ranks.world_size, group.ranks_per_node))
        engine = Engine(model, objective.parameter_sets(), config, group, objective.growth, objective.cut_sets)
    with ledger.sections("restore"):
        store = CheckpointStore(run.checkpoints, group, config.checkpoint.keep, group.from_first(len(run.attempts())))
        start = resume(engine, objective, store)
    ledger.resumed(start)
    with ledger.sections("startup", start):
        if group.ranks.is_first:
            run.start_attempt(start)
        monitor = Monitor(config, group, run, start, ledger)
    return _Loop(config, objective, group, engine, store, stop, ledger.sections, monitor).run(start)


class _Loop:
    """One attempt at a run; holds what its steps share."""

    def __init__(
        self,
        config: TrainConfig,
        objective: Objective,
        group: ProcessGroup,
        engine: Engine,
        store: CheckpointStore,
        stop: StopFlag,
        sections: Sections,
        monitor: Monitor,
    ) -> None:
        self.config, self.objective, self.group, self.engine = config, objective, group, engine
        self.store, self.stop, self.sections, self.monitor = store, stop, sections, monitor
        self.nonfinite_in_a_row = 0
        self.failed_saves = 0
        self.committed = 0

    def run(self, start: int) -> Outcome:
        """Train from ``start`` on."""
        config = self.config
        self.committed = start
        # Told to stop while the model was loaded: there may be no time for a first step.
        if self.group.maximum([self.stop.signal_number])[0] and start < config.num_steps:
            return self._end(Outcome("requeue", f"stopped by {self.stop.reason or 'another rank'}", start))
        with self.sections("validation", start):
            self.monitor.start(self.objective)
            if start == 0:
                self._look(0)
        batches = iter(self.objective.batches(start))
        for step in range(start, config.num_steps):
            with self.sections("compute", step):
                report = self._step(step, batches)
                stop_signal, is_nonfinite = self._agree(report)
            done = step + 1
            self._count_nonfinite(is_nonfinite, report, done)
            self.monitor.after_step(done, report, self.objective, self.nonfinite_in_a_row)
            last = done == config.num_steps
            if last or not stop_signal:  # whoever stops us gives little time: it is for the save
                with self.sections("validation", done):
                    self._look(done)
            if stop_signal or last or done % config.checkpoint.every_steps == 0:
                self._save(done)
            if stop_signal and not last:
                lost = "" if self.committed == done else f"; step {done} could not be saved"
                reason = f"stopped by {self.stop.reason or 'another rank'}{lost}"
                return self._end(Outcome("requeue", reason, self.committed))
        return self._end(Outcome("done", f"all {config.num_steps} steps are done", config.num_steps))

    def _step(self, step: int, batches: Iterator[Batch]) -> StepReport:
        """One optimizer step: all its micro-batches forward and backward, then the update."""
        fault_point("step", self.group.ranks.global_rank, step)
        lr = learning_rate(step, self.config.num_steps, self.config.optim)
        self.engine.begin_step(self.objective.sets_of_step(step), lr)
        losses, keys, start, waited = [], [], self.sections.now(), self.sections.totals["data_wait"]
        is_last = False
        while not is_last:
            with self.sections("data_wait", step):
                batch = next(batches)
            loss = self.objective.loss(self.engine.module, batch)
            losses.append(loss.detach())
            keys += batch["keys"]
            # DeepSpeed skips an update on all ranks when the common gradient norm is not finite: let it be so where the
            # loss is not. Without looking at its value, for which the host would have to wait.
            loss = loss * torch.where(losses[-1].isfinite(), 1.0, math.nan)
            is_last = self.engine.is_last_accumulation
            self.engine.backward(loss)
            grad_norm = self.engine.step()
        self.engine.update_average()
        self.objective.after_step()
        loss_mean, wait_s = sum(torch.stack(losses).tolist()) / len(losses), self.sections.totals["data_wait"] - waited
        return StepReport(loss_mean, grad_norm, lr, wait_s, self.sections.now() - start, tuple(keys))

    def _agree(self, report: StepReport) -> tuple[bool, bool]:
        """Whether any rank was told to stop, and whether the step was lost on any rank. Collective."""
        is_nonfinite = not (math.isfinite(report.loss) and math.isfinite(report.grad_norm))
        stop_signal, nonfinite = self.group.maximum([self.stop.signal_number, is_nonfinite])
        return bool(stop_signal), bool(nonfinite)

    def _count_nonfinite(self, is_nonfinite: bool, report: StepReport, done: int) -> None:
        """Count steps that no rank could take; name their samples; give up after too many in a row."""
        if not is_nonfinite:
            self.nonfinite_in_a_row = 0
            return
        self.nonfinite_in_a_row += 1
        keys = report.keys if not math.isfinite(report.loss) else ()
        named = ", ".join(key for some in self.group.gathered(keys) for key in some) or "no single sample"
        message = f"step {done}: the loss is not finite (samples: {named})"
        if self.nonfinite_in_a_row >= self.config.max_nonfinite_in_a_row:
            raise RunError(
                f"{message}; {self.nonfinite_in_a_row} such steps in a row",
                "look at these samples with `ccmdist shards verify`, lower optim.lr, and run the same command again",
            )
        log.warning("%s; all ranks skipped the update", message)

    def _look(self, done: int) -> None:
        """Held-out losses and sampled images, when they are due. Collective."""
        config = self.config
        last = done == config.num_steps
        if last or done % config.validation.every_steps == 0:
            with torch.no_grad():
                self.monitor.add_losses(done, self.objective.validate(self.engine.module))
        if config.monitor.images_every_steps and (last or done % config.monitor.images_every_steps == 0):
            with torch.no_grad():
                self.monitor.add_images(done, self.objective.images(self.engine.module))

    def _save(self, done: int) -> None:
        """Commit the state; a failure is borne until it has happened too often in a row. Collective."""
        start = self.sections.now()
        with self.sections("checkpoint", done):
            problem = self.store.save(done, self.engine.local, self._facts(done))
        if not problem:
            self.failed_saves, self.committed = 0, done
            self.monitor.saved(done, self.sections.now() - start)
            return
        self.failed_saves += 1
        if self.failed_saves >= self.config.checkpoint.max_failed_saves or done == self.config.num_steps:
            raise CheckpointError(
                f"step {done} could not be saved: {problem} ({self.failed_saves} failed saves in a row)",
                "free space or choose a run folder that can be written; older checkpoints are intact, "
                "and the same command continues from them",
            )
        told = "step %d could not be saved: %s; older checkpoints are intact, the next save tries again"
        log.warning(told, done, problem)

    def _facts(self, done: int) -> dict[str, Any]:
        return {
            "samples_seen": done * self.config.global_batch_size,
            "config_digest": digest(self.config),
            "base_digest": self.objective.base_digest,
            "data_digest": self.objective.data_digest,
            "training_set_digest": source_set_digest(self.config.data, self.objective.data_digest),
            "adam_steps": self.engine.adam_steps(),
            "objective_state": {"growth": growth.state()} if (growth := self.objective.growth) else {},
            "has_average": self.config.optim.ema_decay is not None,
            "world_size": self.group.ranks.world_size,
        }

    def _end(self, outcome: Outcome) -> Outcome:
        self.monitor.close()
        self.group.barrier()
        return outcome
