"""What a run tells while it trains: plain lines in the log, scalars and pictures for TensorBoard.

On a resume the event file is opened with ``purge_step``, so TensorBoard hides what a lost attempt had written
after the checkpoint and curves never overlap. A failing event writer never ends a training run.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from ccmdist.cluster.ledger import Ledger, ettr
from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.train.objectives.objective import Objective


@dataclass(frozen=True)
class StepReport:
    """What one rank saw of one optimizer step.

    Attributes:
        loss: Mean over this rank's micro-batches.
        grad_norm: Norm of the gradient over all ranks before clipping.
        lr: Learning rate.
        wait_s: Seconds spent waiting for data.
        step_s: Seconds of the whole step.
        keys: Keys of this rank's samples.
    """

    loss: float
    grad_norm: float
    lr: float
    wait_s: float
    step_s: float
    keys: tuple[str, ...]


class Monitor:
    """Scalars, pictures and log lines of one attempt. Methods are collective unless they say otherwise."""

    def __init__(
        self, config: TrainConfig, group: ProcessGroup, run: RunDirectory, first_step: int, ledger: Ledger
    ) -> None:
        self.config, self.group, self.first_step, self.ledger = config, group, first_step, ledger
        self._writer = self._opened(run) if group.ranks.is_first else None
        self._start = time.monotonic()
        self._sums = [0.0] * 4
        self._largest_loss = -math.inf

    def start(self, objective: Objective) -> None:
        """Log what is trained; at the first step also show what the model will see. Local."""
        sets = objective.parameter_sets()
        count = {name: sum(_numel(p) for p in parameters.values()) for name, parameters in sets.items()}
        sizes = ", ".join(f"{name}: {number:,} parameters" for name, number in count.items())
        ranks = "1 rank" if (num_ranks := self.group.ranks.world_size) == 1 else f"{num_ranks} ranks"
        log.info("training %s on %s from step %d", sizes, ranks, self.first_step)
        if self._writer and self.first_step == 0 and self.config.monitor.images_every_steps:
            for name, picture in objective.first_batch_images().items():
                self._add_image(name, picture, 0)

    def after_step(self, done: int, report: StepReport, objective: Objective, nonfinite_in_a_row: int) -> None:
        """Gather a step's figures and, every so many steps, write them."""
        for index, value in enumerate((report.loss, report.wait_s, report.step_s, 1.0)):
            self._sums[index] += value
        self._largest_loss = max(self._largest_loss, report.loss)
        if done % self.config.monitor.log_every_steps and done != self.config.num_steps:
            return
        loss, wait_s, step_s, count = self.group.total(self._sums)
        largest, memory = self.group.maximum([self._largest_loss, _memory_gib()])
        self._sums, self._largest_loss = [0.0] * 4, -math.inf
        scalars = {
            "loss/mean": loss / count,
            "loss/max": largest,
            "optim/lr": report.lr,
            "optim/grad_norm": report.grad_norm,
            "optim/nonfinite_in_a_row": nonfinite_in_a_row,
            "time/step_s": step_s / count,
            "time/data_wait_share": wait_s / max(step_s, 1e-9),
            "time/images_per_s": self.config.global_batch_size * count / max(step_s, 1e-9),
            "memory/max_gib": memory,
        }
        self._log(done, scalars)
        self.ledger.flush(done)
        self._add_scalars(done, scalars | objective.describe() | self._goodput())
        sigmas = objective.drawn_sigmas()
        if len(sigmas):  # none where there is no flow
            self._write(lambda w: w.add_histogram("sigma", sigmas, done))

    def add_losses(self, done: int, losses: dict[str, float]) -> None:
        """Write held-out losses. Local."""
        if losses:
            log.info("step %d held out: %s", done, "  ".join(f"{name} {value:.4f}" for name, value in losses.items()))
        self._add_scalars(done, {f"held_out/{name}": value for name, value in losses.items()})

    def add_images(self, done: int, pictures: dict[str, torch.Tensor]) -> None:
        """Write pictures, such as grids of sampled images. Local."""
        for name, picture in pictures.items():
            self._add_image(name, picture, done)
        if pictures:
            self._write(lambda w: w.flush())

    def _add_image(self, name: str, picture: torch.Tensor, done: int) -> None:
        self._write(lambda w: w.add_image(name, picture, done, dataformats="HWC"[: picture.dim()]))

    def saved(self, done: int, seconds: float) -> None:
        """Note that a checkpoint was committed. Local."""
        log.info("step %d: checkpoint committed in %.2f s", done, seconds)
        self.ledger.commit(done, seconds)
        self._add_scalars(done, {"time/save_s": seconds})
        self._write(lambda w: w.flush())

    def close(self) -> None:
        """Flush and close the event file. Local."""
        self._write(lambda w: w.close())

    def _goodput(self) -> dict[str, float]:
        """What the wall time of the run was spent on, over all its attempts."""
        spent = self.ledger.spent()
        return {f"goodput/{bucket}_s": seconds for bucket, seconds in spent.items()} | {"goodput/ettr": ettr(spent)}

    def _log(self, done: int, scalars: dict[str, float]) -> None:
        elapsed = time.monotonic() - self._start
        left = elapsed / (done - self.first_step) * (self.config.num_steps - done)
        log.info(
            "step %d/%d  loss %.4f (max %.4f)  grad norm %.3f  lr %.2e  %.2f images/s  data wait %.0f %%  %.0f s left",
            done,
            self.config.num_steps,
            scalars["loss/mean"],
            scalars["loss/max"],
            scalars["optim/grad_norm"],
            scalars["optim/lr"],
            scalars["time/images_per_s"],
            100 * scalars["time/data_wait_share"],
            left,
        )

    def _add_scalars(self, done: int, scalars: dict[str, float]) -> None:
        def add(writer: Any) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, done)

        self._write(add)

    def _opened(self, run: RunDirectory) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        try:
            return SummaryWriter(str(run.tensorboard), purge_step=self.first_step + 1 if self.first_step else 0)
        except OSError as error:
            _tell_without_curves(error)
            return None

    def _write(self, action: Callable[[Any], None]) -> None:
        """Let the event writer, where there is one, do something; give it up for this attempt when it cannot."""
        if self._writer is not None:
            try:
                action(self._writer)
            except OSError as error:
                # Its thread keeps the error and would raise it again at every call.
                self._writer = None
                _tell_without_curves(error)


def _tell_without_curves(error: OSError) -> None:
    log.warning("TensorBoard events could not be written (%s); training goes on without them", error)


def _memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _numel(parameter: torch.nn.Parameter) -> int:
    """Number of elements, also of a parameter that ZeRO-3 has partitioned."""
    return getattr(parameter, "ds_numel", parameter.numel())
