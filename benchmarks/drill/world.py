"""A small world to train in: phantoms, the tiny model, its cache. Real classes, real files, a second per few steps."""

from pathlib import Path

IMAGE_SIZE_PX = 64
EVERY_STEPS = 3
SETTINGS = [
    "global_batch_size=2",
    "micro_batch_size=1",
    "base=fp32",
    "optim.lr=1e-2",
    "optim.warmup_steps=2",
    "adapter.lora_rank=4",
    "checkpoint.max_failed_saves=2",
    "validation.every_steps=1000000",
    "validation.num_samples=2",
    "validation.sigmas=[0.5]",
    "monitor.log_every_steps=1",
    "monitor.images_every_steps=0",
    "forced_exit_s=30",
    "timeouts.setup_min=1",
    "timeouts.step_min=0.2",
    "timeouts.checkpoint_min=0.2",
    "timeouts.answer_s=3",
]


def make_world(folder: str) -> None:
    """Write shards/, model/ and cache/ into ``folder``; for a process of its own."""
    from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
    from ccmdist.config.loading import load
    from ccmdist.data.phantom_shards import write_phantom_set
    from ccmdist.models.make import make_model
    from ccmdist.precompute.fill import fill_cache

    phantoms = ["subjects_per_group=3", "frames_per_subject=2", f"size_px={IMAGE_SIZE_PX}", "samples_per_shard=4"]
    fractions = ["val_fraction=0.3", "test_fraction=0.3"]
    write_phantom_set(load(PhantomShardsConfig, [], [f"out={folder}/shards", *phantoms, *fractions]))
    make_model("tiny", "2509", Path(folder) / "model", seed=0)
    fill_cache(load(PrecomputeConfig, [], data_overrides(Path(folder))), 0, 1)


def data_overrides(folder: Path) -> list[str]:
    """The section of the configuration that names the world's cache."""
    return [
        f"data.shards={folder}/shards",
        f"data.model={folder}/model",
        f"data.cache={folder}/cache",
        f"data.image_size_px={IMAGE_SIZE_PX}",
        "data.dtype=fp32",
    ]
