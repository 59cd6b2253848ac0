"""Kills, stops and full disks at many points, steps and ranks: longer than a test may take; `make drill`."""

import random

import pytest
import torch

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.train.checkpoint import newest_valid
from tests.distributed.small_world import weights

pytestmark = [pytest.mark.distributed, pytest.mark.drill]

NUM_STEPS = 6
POINTS = (
    "step",
    "checkpoint.begin",
    "checkpoint.write",
    "checkpoint.before_manifest",
    "checkpoint.before_rename",
    "checkpoint.after_rename",
)
ONLY_ON_RANK_0 = ("checkpoint.before_rename", 1)
"""A point that rank 1 never passes: the first rank renames."""
SAVED_AT = (2, 4, 6)


def assert_ends_like(found, straight):
    expected, actual = weights(straight), weights(found)
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def faults(seed):
    """Three faults in a row, each at a random point, rank and step."""
    source = random.Random(seed)
    for action in source.choices(["sigkill", "sigusr2", "sigterm", "enospc"], weights=[4, 2, 1, 1], k=3):
        point = "checkpoint.write" if action == "enospc" else source.choice(POINTS)
        step = source.randrange(NUM_STEPS) if point == "step" else source.choice(SAVED_AT[:-1])
        yield f"{action}@{point}:rank={source.randrange(2)},step={step}"


@pytest.mark.parametrize("seed", range(12))
def test_any_three_faults_in_a_row_leave_the_result_of_the_straight_run(train_ranks, seed):
    assert train_ranks("straight", 2) == [0, 0]
    for fault in faults(seed):
        codes = train_ranks("drilled", 2, fault=fault)
        # Peers of a killed rank see their connection break, unless they are killed before.
        assert all(code in (0, 70, -9) for code in codes), (fault, codes)
    assert train_ranks("drilled", 2) == [0, 0]
    assert RunDirectory(train_ranks.folder / "drilled").exit_code() == 0
    assert_ends_like(train_ranks.folder / "drilled", train_ranks.folder / "straight")


@pytest.mark.parametrize("step", SAVED_AT)
@pytest.mark.parametrize(("point", "rank"), [(p, r) for p in POINTS[1:] for r in (0, 1) if (p, r) != ONLY_ON_RANK_0])
def test_a_kill_at_any_point_of_a_save_loses_nothing_that_was_committed(train_ranks, point, rank, step):
    assert train_ranks("straight", 2) == [0, 0]
    assert -9 in train_ranks("killed", 2, fault=f"sigkill@{point}:rank={rank},step={step}")
    newest = newest_valid(train_ranks.folder / "killed" / "checkpoints")
    assert (newest.step if newest else 0) >= step - 2
    assert train_ranks("killed", 2) == [0, 0]
    assert_ends_like(train_ranks.folder / "killed", train_ranks.folder / "straight")
