"""The weights that each node keeps for itself beside those cut over all ranks are never out of date."""

import pytest

from tests.distributed.small_engine import built, on_nodes_of, slices, steps, trained
from tests.distributed.test_distributed_sharding import same

pytestmark = pytest.mark.distributed


def over_all_ranks_and_over_each_node(group, world):
    """Losses and slices of three steps: over all ranks; over nodes of two; of the last step, taken up again."""
    whole = trained(group, world, "sharding=zero3")
    config, objective, engine = built(on_nodes_of(group, 2), world, "sharding=zero3_hpz")
    told = steps(config, objective, engine, 0, 2)
    kept, adam_steps = slices(engine), engine.adam_steps()
    told += steps(config, objective, engine, 2, 3)
    of_nodes = told, slices(engine)

    def read(name, quantity, start, stop):
        first, values = kept[name]
        return values[quantity][start - first : stop - first]

    engine.load(read, adam_steps)
    return whole, of_nodes, (steps(config, objective, engine, 2, 3), slices(engine))


def test_on_nodes_of_two_ranks_training_and_what_is_taken_up_are_the_same_bit_for_bit(run_ranks, world):
    for (told, whole), (told_of_nodes, of_nodes), (again, taken_up) in run_ranks(
        over_all_ranks_and_over_each_node, 4, str(world)
    ):
        assert told == told_of_nodes
        assert same(whole, of_nodes)
        assert again == told[-len(again) :]
        assert same(whole, taken_up)
