"""Two adapters in the small world: their cache with holes, and what the ranks of their tests run."""

from itertools import islice
from pathlib import Path

from ccmdist.config.loading import load
from tests.distributed.small_engine import built, slices, steps
from tests.distributed.small_world import IMAGE_SIZE_PX, data_overrides

HOLES = ["data.holes.per_sample=2", "data.holes.shapes=[rectangle,quadrant]", "data.holes.seed=3"]
DUAL = [*HOLES, "objective.kind=dual", "optim.ema_decay=0.9"]
FILLING = [
    *HOLES,
    "objective.kind=dual",
    "objective.adapters=[completion]",
    "adapter.lora_rank=16",
    "activation_checkpointing=none",
    "global_batch_size=16",
    "micro_batch_size=16",
    "validation.num_samples=8",
    "validation.sigmas=[0.1,0.3,0.5,0.7,0.9]",
    "monitor.num_images=8",
]


def add_holes(folder):
    """Cache the samples of a world with holes too, beside the cache without."""
    from ccmdist.config.data import PrecomputeConfig
    from ccmdist.precompute.fill import fill_cache

    fill_cache(load(PrecomputeConfig, [], [*data_overrides(Path(folder)), *HOLES]), 0, 1)


def make_fitted_world(folder):
    """Phantoms, the fitted tiny model and its cache with holes."""
    from ccmdist.config.data import PhantomShardsConfig
    from ccmdist.data.phantom_shards import write_phantom_set
    from ccmdist.models.make import make_model

    overrides = [f"out={folder}/shards", "subjects_per_group=6", f"size_px={IMAGE_SIZE_PX}", "val_fraction=0.3"]
    write_phantom_set(load(PhantomShardsConfig, [], overrides))
    make_model("tiny", "2509", Path(folder) / "model", seed=0, fitted=True)
    add_holes(folder)


def turns(group, world, num_steps):
    """For some steps of both adapters: which was trained, and the state before the first and after each.

    And of one linear where the bias of each adapter lies.
    """
    config, objective, engine = built(group, world, *DUAL)
    objective.after_step()
    batches, told = iter(objective.batches(0)), [("", slices(engine), engine.adam_steps())]
    for step in range(num_steps):
        (trained,) = objective.sets_of_step(step)
        engine.begin_step(objective.sets_of_step(step), 1e-2)
        for batch in islice(batches, config.global_batch_size // config.micro_batch_size // group.ranks.world_size):
            engine.backward(objective.loss(engine.module, batch))
            engine.step()
        engine.update_average()
        objective.after_step()
        told.append((trained, slices(engine), engine.adam_steps()))
    linear = engine.module.module.get_submodule("transformer_blocks.0.attn.to_q")
    return told, {name: linear.get_submodule(name).bias.data_ptr() for name in objective.named.of}


def filling(group, world, num_steps, seed):
    """Held-out loss in the hole, and mean error of pixels there in filled frames: before and after training."""
    config, objective, engine = built(group, world, *FILLING, f"seed={seed}")
    objective.after_step()
    told = [_in_the_hole(objective, engine)]
    steps(config, objective, engine, 0, num_steps, lr=1.6e-2)
    return [*told, _in_the_hole(objective, engine)]


def _in_the_hole(objective, engine):
    import numpy as np
    import torch

    from ccmdist.data.holes import unpacked
    from ccmdist.data.stream import collated
    from ccmdist.models.encoders import LatentCodec
    from ccmdist.train.objectives.ordered_samples import spread_over

    codec, errors = LatentCodec.load(objective.folder, torch.float32, "cpu"), []
    with torch.no_grad():
        loss, rows = objective.validate(engine.module)["completion/mean"], objective._sampled_rows(engine.module)
    entries = spread_over(objective.cache.entries("val"), objective.config.monitor.num_images)
    for entry, (*_, real, filled) in zip(entries, rows, strict=True):
        holes = collated(objective.cache, [entry])["holes"][0]
        hole = unpacked(holes[objective._hole_of(entry.key, len(holes))], IMAGE_SIZE_PX).numpy()
        pictures = [codec.decode(latents.float())[0].astype(float) for latents in (real, filled)]
        errors.append(np.abs(pictures[1] - pictures[0])[hole].mean())
    return loss, float(np.mean(errors))
