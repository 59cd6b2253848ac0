"""The weights that each node keeps for itself beside those cut over all ranks are never out of date."""

import pytest

from tests.distributed.small_engine import built, on_nodes_of, slices, steps
from tests.distributed.test_distributed_sharding import same

pytestmark = pytest.mark.distributed


def over_all_ranks_and_over_each_node(group, world):
    """Losses and slices of steps 2 and 3: over all ranks; and over nodes of two, which take the state before them."""
    config, objective, engine = built(group, world, "sharding=zero3")
    steps(config, objective, engine, 0, 2)
    kept, adam_steps = slices(engine), engine.adam_steps()
    over_all = steps(config, objective, engine, 2, 4), slices(engine)

    def read(name, quantity, start, stop):
        first, values = kept[name]
        return values[quantity][start - first : stop - first]

    config, objective, engine = built(on_nodes_of(group, 2), world, "sharding=zero3_hpz")
    engine.load(read, adam_steps)
    return over_all, (steps(config, objective, engine, 2, 4), slices(engine))


def test_on_nodes_of_two_ranks_a_run_goes_on_bit_for_bit(run_ranks, world):
    for (told, expected), (told_of_nodes, found) in run_ranks(over_all_ranks_and_over_each_node, 4, str(world)):
        assert told == told_of_nodes
        assert same(expected, found)
