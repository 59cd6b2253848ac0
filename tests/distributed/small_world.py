"""A small world for training tests, and what its processes run: importable by name, so that they can be forked."""

import os
import sys
from pathlib import Path

from ccmdist.config.loading import load

IMAGE_SIZE_PX = 64
SETTINGS = [
    "num_steps=6",
    "global_batch_size=4",
    "micro_batch_size=1",
    "base=fp32",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "adapter.lora_rank=4",
    "checkpoint.every_steps=2",
    "validation.every_steps=3",
    "validation.num_samples=2",
    "validation.sigmas=[0.3,0.7]",
    "monitor.log_every_steps=1",
    "monitor.images_every_steps=0",
    "timeouts.step_min=2",
]


def make_world(folder):
    """Phantoms, the tiny model and its cache: shards/, model/ and cache/ in ``folder``."""
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


def train_rank(job, rank, world_size, rendezvous, fault, patch):
    """One rank of a run, with a fault to suffer and a change to the library to make before."""
    import torch

    from ccmdist.cluster.ranks import Ranks
    from ccmdist.jobs.train_rank import run_rank

    os.environ["CCMDIST_FAULT"] = fault
    torch.set_num_threads(1)
    if patch is not None:
        patch(rank)
    sys.exit(run_rank(job, Ranks(rank, rank, world_size), rendezvous))


def exit_codes(children):
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


def weights(folder):
    """Name -> whole trained parameter, of the newest checkpoint of the run in ``folder``."""
    from ccmdist.train.checkpoint import newest_valid

    checkpoint = newest_valid(folder / "checkpoints")
    return {name: checkpoint.whole(name, "weight") for name in checkpoint.manifest["parameters"]}


def losses(folder, tag="loss/mean"):
    """(step, value) of a curve of the run in ``folder``, as TensorBoard's own reader sees it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]
