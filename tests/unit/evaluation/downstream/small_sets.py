"""Phantoms, and synthetic sets that resemble them, as `ccmdist synthesize` would have drawn them."""

import numpy as np

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_shard
from ccmdist.data.writer import write_set
from tests.unit.evaluation.drawn_images import drawn

SIZE_PX = 64


def phantoms(folder, subjects_per_group=5, **settings):
    """A set of phantoms; its manifest."""
    values = {"size_px": SIZE_PX, "test_fraction": 0.3, "val_fraction": 0.3, **settings}
    return write_phantom_set(PhantomShardsConfig(out=folder, subjects_per_group=subjects_per_group, **values))


def samples(folder):
    """All samples of a set."""
    return [triple for entry in read_manifest(folder).shards for triple in read_shard(folder, entry)]


def draw(real, out, training="untuned", num=1, keep=lambda triple: True, split="test"):
    """A set of noisy copies of a set's frames, ``num`` of each, that says of its generator what ``training`` says."""
    rng = np.random.default_rng(0)

    def images():
        for triple in filter(keep, samples(real)):
            for number in range(num):
                yield split, drawn(triple, triple.image + rng.normal(0, 8, triple.image.shape), number)

    return write_set(out, "synthetic", images(), 16, {} if training is None else {"training": training})


def trained_on(manifest, split="train", subjects=True):
    """What a set says whose generator was trained on a split of a set."""
    names = sorted({subject for shard in manifest.of_split(split) for subject in shard.subjects})
    return {"set_digest": manifest.digest, "split": split, "subjects": names if subjects else None}


def config_of(real, synthetic, out, *more):
    """Settings with a grid of two folds, two seeds and few steps."""
    overrides = [f"real={real}", *(f"synthetic.{name}={folder}" for name, folder in synthetic.items()), f"out={out}"]
    overrides += ["downstream.num_folds=2", "downstream.num_seeds=2", "downstream.networks.size_px=32"]
    overrides += ["downstream.networks.num_steps=4", "downstream.networks.unet_channels=[4,8]"]
    overrides += ["downstream.networks.validate_every_steps=2", "downstream.networks.batch_size=6", "num_bootstrap=100"]
    return load(EvaluateConfig, [], [*overrides, *more])
