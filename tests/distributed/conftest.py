"""A small world for training tests: phantoms, the tiny model and its cache, made once per session."""

import json
import os
import shutil
from pathlib import Path

import pytest

from ccmdist.config.loading import load, resolved
from ccmdist.config.train import TrainConfig

IMAGE_SIZE_PX = 64


def _make_world(folder):
    """Runs in a process forked from the preloaded server."""
    from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
    from ccmdist.data.phantom_shards import write_phantom_set
    from ccmdist.models.make import make_model
    from ccmdist.precompute.fill import fill_cache

    folder = Path(folder)
    overrides = [
        f"out={folder}/shards",
        "subjects_per_group=3",
        "frames_per_subject=2",
        f"size_px={IMAGE_SIZE_PX}",
    ]
    write_phantom_set(
        load(PhantomShardsConfig, [], [*overrides, "val_fraction=0.3", "test_fraction=0.3", "samples_per_shard=4"])
    )
    make_model("tiny", "2509", folder / "model", seed=0)
    fill_cache(load(PrecomputeConfig, [], data_overrides(folder)), 0, 1)


def data_overrides(folder):
    """The section that names the world's cache."""
    return [
        f"data.shards={folder}/shards",
        f"data.model={folder}/model",
        f"data.cache={folder}/cache",
        f"data.image_size_px={IMAGE_SIZE_PX}",
        "data.dtype=fp32",
    ]


@pytest.fixture(scope="session")
def world(forkserver, tmp_path_factory):
    """Folder with shards/, model/ and cache/."""
    folder = tmp_path_factory.mktemp("world")
    child = forkserver.Process(target=_make_world, args=(str(folder),))
    child.start()
    child.join(timeout=300)
    assert child.exitcode == 0, "the test world could not be made"
    return folder


SETTINGS = [
    "num_steps=6",
    "global_batch_size=4",
    "micro_batch_size=1",
    "base_dtype=fp32",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "adapter.lora_rank=4",
    "checkpoint.every_steps=2",
    "validation.every_steps=3",
    "validation.num_samples=2",
    "validation.sigmas=[0.3,0.7]",
    "monitor.log_every_steps=1",
    "monitor.images_every_steps=0",
    "collective_timeout_min=1",
]


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
                target=_train_rank, args=(str(job), rank, world_size, f"file://{rendezvous}", fault, patch)
            )
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        return _codes(children)

    run.folder = tmp_path
    yield run
    shutil.rmtree(tmp_path, ignore_errors=True)


def _codes(children):
    """Exit codes; when one rank is killed the others, which wait for it, are killed too, as srun would."""
    while any(child.exitcode is None for child in children):
        for child in children:
            child.join(timeout=0.05)
        if any(child.exitcode not in (None, 0) for child in children):
            for child in children:
                child.join(timeout=3)
                if child.is_alive():
                    child.kill()
    return [child.exitcode for child in children]


def _train_rank(job, rank, world_size, rendezvous, fault, patch):
    import sys

    import torch

    from ccmdist.cluster.ranks import Ranks
    from ccmdist.jobs.train_rank import run_rank

    os.environ["CCMDIST_FAULT"] = fault
    torch.set_num_threads(1)
    if patch is not None:
        patch(rank)
    sys.exit(run_rank(job, Ranks(rank, rank, world_size), rendezvous))
