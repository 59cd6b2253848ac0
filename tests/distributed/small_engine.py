"""What the ranks of a test run that train by the objective and the engine alone, without the loop around them."""

import dataclasses
from pathlib import Path

from tests.distributed.small_world import SETTINGS, data_overrides


def built(group, world, *overrides):
    """Configuration, objective and engine of a run in the small world."""
    from ccmdist.config.loading import load
    from ccmdist.config.train import TrainConfig
    from ccmdist.train.engine import Engine, zero_config
    from ccmdist.train.objectives.choice import objective_of

    config = load(TrainConfig, [], ["run=unused", *data_overrides(Path(world)), *SETTINGS, *overrides])
    objective = objective_of(config, group)
    model = objective.build(zero_config(config, group.ranks.world_size, group.ranks_per_node))
    return (
        config,
        objective,
        Engine(model, objective.parameter_sets(), config, group, objective.growth, objective.cut_sets),
    )


def steps(config, objective, engine, first, stop, lr=1e-2):
    """Loss of each micro-batch of this rank, and the norm at the end of each optimizer step ``first`` to ``stop``."""
    told = []
    objective.after_step()
    batches = iter(objective.batches(first))
    for step in range(first, stop):
        is_last = False
        engine.begin_step(objective.sets_of_step(step), lr)
        while not is_last:
            loss = objective.loss(engine.module, next(batches))
            is_last = engine.is_last_accumulation
            engine.backward(loss)
            norm = engine.step()
            told.append((float(loss.detach()), norm if is_last else None))
        objective.after_step()
    return told


def slices(engine):
    """Copies of what this rank holds of every trained parameter: (start, {quantity: values})."""
    return {
        name: (local.start, {quantity: values.clone() for quantity, values in local.values.items()})
        for name, local in engine.local.items()
    }


def reading(kept):
    """What :meth:`Engine.load` asks for a state, given the slices of a rank that are all it will ask for."""

    def read(name, quantity, start, stop):
        first, values = kept[name]
        return values[quantity][start - first : stop - first]

    return read


def trained(group, world, *overrides, num_steps=3):
    """Losses and norms of some steps, and the slices after them."""
    config, objective, engine = built(group, world, *overrides)
    return steps(config, objective, engine, 0, num_steps), slices(engine)


def in_each_mode(group, world, modes):
    """What :func:`trained` gives for each of several lists of overrides, one after the other."""
    return [trained(group, world, *overrides) for overrides in modes]


def taken_up(group, world, *overrides):
    """Slices and losses of a run, and of one that takes over its state after two of four steps and after a forward."""
    import torch

    config, objective, engine = built(group, world, *overrides)
    told = steps(config, objective, engine, 0, 2)
    kept, adam_steps = slices(engine), engine.adam_steps()
    told += steps(config, objective, engine, 2, 4)

    config, objective, second = built(group, world, *overrides)
    with torch.no_grad():
        for _ in range(4):  # after DeepSpeed has traced a forward, what persists stays gathered: the load replaces it
            objective.validate(second.module)
    second.load(reading(kept), adam_steps)
    again = steps(config, objective, second, 2, 4)
    return told[-len(again) :], again, slices(engine), slices(second)


def on_nodes_of(group, ranks_per_node):
    """The same group as if its ranks were spread over nodes of ``ranks_per_node``."""
    local_rank = group.ranks.global_rank % ranks_per_node
    group.ranks = dataclasses.replace(group.ranks, local_rank=local_rank)
    group.ranks_per_node = ranks_per_node
    return group
