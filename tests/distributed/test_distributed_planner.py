"""What the planner says of bytes held and received is what DeepSpeed holds and receives."""

import pytest

from ccmdist.planner.memory import REDUCE_BUCKET
from tests.distributed.counted_engine import counted_in_turn
from tests.distributed.small_engine import built, steps

pytestmark = pytest.mark.distributed

RUNS = {
    "zero3": ["base=bf16", "sharding=zero3", "tabulate_modulation=false"],
    "zero3, tabled": ["base=bf16", "sharding=zero3", "activation_checkpointing=none"],
    "replicated": ["base=bf16", "sharding=replicated"],
}


def test_two_ranks_hold_and_receive_what_was_planned(run_ranks, world):
    """Exactly, but for frozen weights: of those DeepSpeed keeps the last block for the way back, and fetches layers
    around the blocks once. Of 60 blocks that is little, of the four here it is much."""
    for found in run_ranks(counted_in_turn, 2, str(world), RUNS):
        for name, run in found.items():
            held, memory, traffic, received = (run[part] for part in ("held", "memory", "traffic", "received"))
            assert held["frozen"] == memory["weights"], name
            assert held["moments"] == memory["moments"], name
            assert held["bucket"] == 4 * REDUCE_BUCKET, name
            assert held["bucket"] + 2 * held["gradients"] == memory["gradients"], name
            assert received["gathered 4"] == traffic["adapter_per_step"], name
            assert received["reduced 4"] == traffic["num_micro_steps"] * traffic["gradients_per_micro_step"], name
            gathered = received.get("gathered 2", 0) / traffic["num_micro_steps"]
            kept = run["block_bytes"] + 2 * run["outer_bytes"]
            assert traffic["weights_per_micro_step"] - kept / 2 <= gathered <= traffic["weights_per_micro_step"], name


def whole_adapter(group, world):
    """Whether what forward uses of each trained parameter lies where DeepSpeed's partition of it does."""
    config, objective, engine = built(group, world, *RUNS["replicated"])
    steps(config, objective, engine, 0, 1)
    return [parameter.data_ptr() == parameter.ds_tensor.data_ptr() for _, parameter in engine._named_parameters()]


def test_one_rank_holds_no_second_copy_of_the_adapter(run_ranks, world):
    assert all(run_ranks(whole_adapter, 1, str(world))[0])
