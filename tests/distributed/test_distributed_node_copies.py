"""The weights that each node keeps for itself beside those cut over all ranks are never out of date."""

import pytest

from tests.distributed.small_engine import built, on_nodes_of, reading, slices, steps
from tests.distributed.test_distributed_checkpoint import make_engine
from tests.distributed.test_distributed_sharding import same

pytestmark = pytest.mark.distributed


def over_all_ranks_and_over_each_node(group, world):
    """Losses and slices of steps 2 and 3: over all ranks; and over nodes of two, which take the state before them."""
    config, objective, engine = built(group, world, "sharding=zero3")
    steps(config, objective, engine, 0, 2)
    kept, adam_steps = slices(engine), engine.adam_steps()
    over_all = steps(config, objective, engine, 2, 4), slices(engine)
    config, objective, engine = built(on_nodes_of(group, 2), world, "sharding=zero3_hpz")
    engine.load(reading(kept), adam_steps)
    return over_all, (steps(config, objective, engine, 2, 4), slices(engine))


def test_on_nodes_of_two_ranks_a_run_goes_on_bit_for_bit(run_ranks, world):
    for (told, expected), (told_of_nodes, found) in run_ranks(over_all_ranks_and_over_each_node, 4, str(world)):
        assert told == told_of_nodes
        assert same(expected, found)


def forwards_after_a_load(group):
    """Outputs of a model that is no blocks, of which DeepSpeed lets everything go until it has traced a forward."""
    import torch

    engine = make_engine(on_nodes_of(group, 2), "sharding=zero3_hpz", "base=fp32")
    engine.load(lambda name, quantity, start, stop: torch.zeros(stop - start), {"first": 0, "second": 0})
    with torch.no_grad():
        return [engine.module(torch.ones(1, 5)).abs().max().item() for _ in range(3)]


def test_on_nodes_of_two_ranks_every_forward_sees_what_was_taken_up(run_ranks):
    assert run_ranks(forwards_after_a_load, 4) == [[0.0] * 3] * 4
