"""Fixtures of training tests: a small world, made once per session, and ranks that train in it."""

import json
import shutil

import pytest

from ccmdist.config.loading import load, resolved
from ccmdist.config.train import TrainConfig
from tests.distributed.small_world import SETTINGS, data_overrides, exit_codes, train_rank


@pytest.fixture
def train_ranks(forkserver, world, tmp_path):
    """Train as ``world_size`` ranks, as srun would start them; their exit codes."""

    def run(name, world_size, *overrides, fault="", allow=(), patch=None):
        config = load(TrainConfig, [], [f"run={tmp_path / name}", *data_overrides(world), *SETTINGS, *overrides])
        job = tmp_path / f"{name}.json"
        job.write_text(json.dumps({"settings": resolved(config), "allowed_changes": sorted(allow)}))
        rendezvous = tmp_path / f"rendezvous-{name}"
        rendezvous.unlink(missing_ok=True)
        children = [
            forkserver.Process(
                target=train_rank, args=(str(job), rank, world_size, f"file://{rendezvous}", fault, patch)
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        return exit_codes(children)

    run.folder = tmp_path
    yield run
    shutil.rmtree(tmp_path, ignore_errors=True)
