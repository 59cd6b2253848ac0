"""A rank takes its part of the machine's cores, and no more than the cluster gave it."""

import os

import pytest

from ccmdist.cluster.ranks import Ranks
from ccmdist.jobs import train_rank


@pytest.mark.parametrize(
    ("rendezvous", "omp", "expected"), [("file:///a", "1", 4), ("env://", None, 4), ("env://", "6", None)]
)
def test_under_srun_the_batch_script_says_how_many_cores_a_rank_has(monkeypatch, rendezvous, omp, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    taken = []
    monkeypatch.setattr(train_rank.torch, "set_num_threads", taken.append)
    train_rank._share_cores(Ranks(0, 0, 2), rendezvous)
    assert taken == ([] if expected is None else [expected])
