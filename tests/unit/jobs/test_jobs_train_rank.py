"""A rank takes its part of the machine's cores, and no more than somebody gave it."""

import os

import pytest

from ccmdist.cluster.ranks import Ranks
from ccmdist.jobs import train_rank


@pytest.mark.parametrize(
    ("world_size", "omp", "expected"), [(1, "1", []), (2, "6", []), (2, None, [4]), (16, None, [1])]
)
def test_a_rank_takes_its_part_of_the_cores_unless_it_was_told_how_many(monkeypatch, world_size, omp, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    taken = []
    monkeypatch.setattr(train_rank.torch, "set_num_threads", taken.append)
    train_rank._share_cores(Ranks(0, 0, world_size))
    assert taken == expected
