"""Runs that train an adapter on the tiny model in this process, and their loss on subjects that were held out."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.train import TrainConfig
from ccmdist.train.engine import Engine, zero_config
from ccmdist.train.objectives.edit import ADAPTER_SET, EditObjective
from ccmdist.train.optim import learning_rate, optimizer

from .rivals import AdaLoRA


@dataclass(frozen=True)
class Trained:
    """What one run came to.

    Attributes:
        loss: Held-out flow loss: mean over the samples of a split and the noise levels of validation.
        parameters: Trained ones that are in use at the end.
        ranks: Linear -> its rank at the end.
    """

    loss: float
    parameters: int
    ranks: dict[str, int]


def in_engine(
    config: TrainConfig, group: ProcessGroup, split: str, kind: type[EditObjective] = EditObjective
) -> Trained:
    """A run as `ccmdist train` makes it, without checkpoints and monitor; its loss on a split."""
    objective = kind(config, group)
    model = objective.build(zero_config(config, 1, 1))
    engine = Engine(model, objective.parameter_sets(), config, group, objective.growth)
    objective.after_step()
    batches = iter(objective.batches(0))
    for step in range(config.num_steps):
        engine.begin_step(objective.sets_of_step(step), learning_rate(step, config.num_steps, config.optim))
        engine.backward(objective.loss(engine.module, next(batches)))
        engine.step()
        objective.after_step()
    return Trained(held_out(objective, engine.module, split), *_in_use(objective))


def in_plain_loop(
    config: TrainConfig, group: ProcessGroup, split: str, kind: type[EditObjective] = EditObjective
) -> Trained:
    """The same without DeepSpeed, so that gradients stay where PEFT looks for them."""
    objective = kind(config, group)
    model = objective.build(zero_config(config, 1, 1))
    objective.after_step()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = optimizer({ADAPTER_SET: parameters}, config.optim)
    batches = iter(objective.batches(0))
    for step in range(config.num_steps):
        adamw.set_lr(learning_rate(step, config.num_steps, config.optim))
        objective.loss(model, next(batches)).backward()
        nn.utils.clip_grad_norm_(parameters, config.optim.max_grad_norm)
        adamw.step()
        if isinstance(objective, AdaLoRA):
            objective.allocate(step)
        adamw.zero_grad()
        objective.after_step()
    return Trained(held_out(objective, model, split), *_in_use(objective))


def untuned(config: TrainConfig, group: ProcessGroup, split: str) -> Trained:
    """What the model comes to before the first step."""
    objective = EditObjective(config, group)
    model = objective.build(zero_config(config, 1, 1))
    objective.after_step()
    return Trained(held_out(objective, model, split), 0, {})


@torch.no_grad()
def held_out(objective: EditObjective, model: nn.Module, split: str) -> float:
    """Mean flow loss over a split's samples and the noise levels of validation."""
    losses = [objective._held_out_losses(model, e).mean() for e in objective.cache.entries(split)]
    return float(torch.stack(losses).mean())


def _in_use(objective: Any) -> tuple[int, dict[str, int]]:
    """Parameters that are in use, and the rank of every linear."""
    if isinstance(objective, AdaLoRA):
        return objective.in_use()
    modules = objective.adapted.modules
    ranks = {name: _shape(module.lora_A)[0] for name, module in modules.items()}
    if objective.growth is not None:
        ranks = objective.growth.active
    count = sum(rank * (modules[name].in_features + modules[name].out_features) for name, rank in ranks.items())
    magnitudes = sum(module.out_features for module in modules.values() if hasattr(module, "magnitude"))
    return count + magnitudes, ranks


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Also of one that DeepSpeed manages."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
