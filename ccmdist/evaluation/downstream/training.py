"""One network of a downstream task: trained, chosen on real validation images, tested on real test images.

A cell of the grid takes seconds to minutes, so a whole cell is what is resumed, and there are no checkpoints in it.
Everything random is a function of the seed and the step. On the CPU it computes on one core: the bytes of a result must
not depend on how many cores a worker has, and a grid has more cells than a machine has cores.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ccmdist.config.evaluate import NetworkSettings, Task
from ccmdist.evaluation.downstream.augmentation import augmented, transforms
from ccmdist.evaluation.downstream.examples import Examples
from ccmdist.evaluation.downstream.looks import Look, looks_of
from ccmdist.evaluation.downstream.networks import (
    as_input,
    built,
    losses,
    parameter_count,
    probabilities,
    target_of,
    trained_state,
)

WEIGHT_DECAY: Final = 1e-4
TEST_BATCH: Final = 32


@dataclass(frozen=True)
class Curve:
    """Losses over the optimizer steps with one learning rate."""

    lr: float
    steps: tuple[int, ...]
    """At which it was validated."""
    training: tuple[float, ...]
    """Mean over the steps since the last one."""
    validation: tuple[float, ...]
    """Mean over the real validation images."""


@dataclass(frozen=True)
class Tested:
    """What the chosen network says of the test images."""

    probabilities: NDArray[np.float32]
    """(N, 3) of the clinical groups, or (N, H, W) of nerve."""
    lr: float
    step: int
    """With these it was best on the validation images."""
    curves: tuple[Curve, ...]
    num_parameters: int
    """That were trained."""
    looks: tuple[Look, ...] = ()
    """Where the network looked, of a diagnosis."""


def train_and_test(
    task: Task,
    settings: NetworkSettings,
    training: Examples,
    validation: Examples,
    test: Examples,
    seed: int,
    device: torch.device,
    is_augmented: bool = False,
) -> Tested:
    """Train with every learning rate, and test the state that had the lowest loss on the validation images.

    The loss chooses, and not a score, for it is defined for any images and is finer than a score of few.

    Args:
        task: What is learnt.
        settings: Network, steps, learning rates.
        training: At least one image; batches hold all groups alike, whatever their shares.
        validation: Real images.
        test: Real images.
        seed: Of weights, batches and augmentation.
        device: That computes.
        is_augmented: Augment the training images.
    """
    best: tuple[float, float, int, dict[str, Tensor]] | None = None
    curves = []
    with _reproducible(device):
        torch.manual_seed(seed)
        network = built(task, settings).to(device)  # once: the language model of MDF-MLLM can fill a GPU
        begun = trained_state(network)
        run = _Run(task, settings, network, training, validation, seed, device, is_augmented)
        for lr in settings.lrs:
            network.load_state_dict(begun, strict=False)
            curve, state, step = run.learn(lr)
            curves.append(curve)
            loss = min(curve.validation)
            if best is None or loss < best[0]:
                best = loss, lr, step, state
        assert best is not None, "there is at least one learning rate"
        network.load_state_dict(best[3], strict=False)  # what is frozen is as it was built
        found = _predicted(task, network, test, device)
        looks = looks_of(network, test, device) if task == "diagnosis" else ()
    return Tested(found.numpy(), best[1], best[2], tuple(curves), parameter_count(network), looks)


class _Run:
    """Trainings of a network that differ in their learning rate."""

    def __init__(
        self,
        task: Task,
        settings: NetworkSettings,
        network: nn.Module,
        training: Examples,
        validation: Examples,
        seed: int,
        device: torch.device,
        is_augmented: bool,
    ) -> None:
        self.task, self.settings, self.network = task, settings, network
        self.training, self.validation = training, validation
        self.seed, self.device = seed, device
        self.chain = transforms(settings.size_px) if is_augmented else None
        self.loss = losses(task)

    def learn(self, lr: float) -> tuple[Curve, dict[str, Tensor], int]:
        """Losses over the steps from the network as it is, the state with the lowest validation loss, and its step."""
        settings = self.settings
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr, weight_decay=WEIGHT_DECAY)
        steps: list[int] = []
        losses: list[tuple[float, float]] = []
        recent: list[Tensor] = []
        best, best_step, best_state = float("inf"), 0, dict[str, Tensor]()
        for step in range(1, settings.num_steps + 1):
            recent.append(self._step(optimizer, step))
            if step % settings.validate_every_steps == 0 or step == settings.num_steps:
                loss = self._validation_loss()
                steps.append(step)
                losses.append((float(torch.stack(recent).mean()), loss))
                recent = []
                if loss < best or not best_state:
                    best, best_step = loss, step
                    best_state = trained_state(self.network)
        training, validation = zip(*losses, strict=True)
        return Curve(lr, tuple(steps), training, validation), best_state, best_step

    def _step(self, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
        chosen = batch_of(self.training.labels, self.settings.batch_size, self.seed, step)
        images, masks = (torch.from_numpy(values[chosen]) for values in (self.training.images, self.training.masks))
        if self.chain is not None:
            images, masks = augmented(images, masks, self.chain, hash_of(self.seed, step))
        labels = torch.from_numpy(self.training.labels[chosen])
        self.network.train()
        logits = self.network(as_input(images.to(self.device)))
        loss = self.loss(logits, target_of(self.task, masks.to(self.device), labels.to(self.device)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self.network.eval()
        total = 0.0
        for images, masks, labels in _batches(self.validation, self.device):
            loss = self.loss(self.network(as_input(images)), target_of(self.task, masks, labels))
            total += float(loss) * len(images)
        return total / len(self.validation)


def batch_of(labels: NDArray[np.int64], batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """Which images the batch of a step holds: the groups in turn, and within a group each image once per round.

    A pure function: no step depends on which ones were made before.

    Args:
        labels: (N,), of the images.
        batch_size: Places in the batch.
        seed: Draws the order of each round.
        step: Counted from 1.
    """
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    first = (step - 1) * batch_size
    chosen = []
    for position in range(first, first + batch_size):
        group = position % len(groups)
        round_, place = divmod(position // len(groups), len(groups[group]))
        chosen.append(groups[group][_order(seed, group, round_, len(groups[group]))[place]])
    return np.array(chosen)


@lru_cache(maxsize=16)
def _order(seed: int, group: int, round_: int, num: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, group, round_]).permutation(num)


def hash_of(*numbers: int) -> int:
    """A seed of 32 bits that the numbers decide."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@torch.no_grad()
def _predicted(task: Task, network: nn.Module, examples: Examples, device: torch.device) -> Tensor:
    network.eval()
    found = [
        probabilities(task, network(as_input(images))).float().cpu() for images, _, _ in _batches(examples, device)
    ]
    whole = torch.cat(found)
    return whole if task == "diagnosis" else whole[:, 0]


def _batches(examples: Examples, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for first in range(0, len(examples), TEST_BATCH):
        part = slice(first, first + TEST_BATCH)
        arrays: tuple[NDArray[Any], ...] = (examples.images[part], examples.masks[part], examples.labels[part])
        images, masks, labels = (torch.from_numpy(values).to(device) for values in arrays)
        yield images, masks, labels


@contextlib.contextmanager
def _reproducible(device: torch.device) -> Iterator[None]:
    """The same numbers from the same machine, and on the CPU from any number of cores."""
    num_threads, was = torch.get_num_threads(), torch.backends.cudnn.deterministic
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.set_num_threads(num_threads)
        torch.backends.cudnn.deterministic = was
