"""Where the frozen weights lie is a matter of memory and speed alone."""

import pytest
import torch

from tests.distributed.small_engine import in_each_mode, taken_up

pytestmark = pytest.mark.distributed


def same(slices, others):
    return slices.keys() == others.keys() and all(
        start == others[name][0] and all(torch.equal(values[q], others[name][1][q]) for q in values)
        for name, (start, values) in slices.items()
    )


def test_wherever_the_base_lies_and_whatever_is_recomputed_training_is_the_same_bit_for_bit(run_ranks, world):
    """DeepSpeed keeps the groups of zero3_hpz for the rest of a process, so that mode comes last."""
    modes = [
        ["sharding=zero3"],
        ["sharding=zero3", "activation_checkpointing=selective"],
        ["sharding=replicated", "activation_checkpointing=none"],
        ["sharding=zero3_hpz"],
    ]
    for (told, slices), *in_other_modes in run_ranks(in_each_mode, 2, str(world), modes):
        for others_told, others in in_other_modes:
            assert told == others_told
            assert same(slices, others)


def test_what_a_run_takes_up_replaces_every_copy_of_the_adapter(run_ranks, world):
    for told, again, slices, others in run_ranks(taken_up, 2, str(world), "sharding=replicated"):
        assert told == again
        assert same(slices, others)
