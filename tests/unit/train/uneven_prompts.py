"""A source set whose prompts have two lengths, with a tiny model and a cache that is written by hand."""

import numpy as np
import torch

from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import cache_folder, commit_fingerprint, fingerprint
from ccmdist.data.holes import holes_of, layout_of, packed
from ccmdist.data.latent_cache import EncodedSample, write_cache_shard
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple, TripleMeta, prompt_for
from ccmdist.data.writer import write_set
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from tests.distributed.small_world import IMAGE_SIZE_PX, data_overrides

WITHOUT_EYE, WITH_EYE = 9, 12
"""Lengths of the prompts in tokens; a cache of a real encoder has them near 250."""


def train_config(folder, *overrides):
    """Four samples to a step, two to a forward."""
    return load(
        TrainConfig,
        [],
        [
            f"run={folder}/run",
            *data_overrides(folder),
            "base=fp32",
            "global_batch_size=4",
            "micro_batch_size=2",
            "tabulate_modulation=false",
            *overrides,
        ],
    )


def make_uneven_world(folder, *overrides):
    """Eleven training samples, seven with the eye in their prompt, and three of val: shards/, model/, cache/."""
    manifest = write_set(folder / "shards", "phantom", _triples(), 4)
    make_model("tiny", "2509", folder / "model", seed=0)
    data = train_config(folder, *overrides).data
    wanted = fingerprint(data, manifest.digest, ModelFolder.open(data.model).encoder_identity())
    cache, source = cache_folder(data, wanted), torch.Generator().manual_seed(0)
    commit_fingerprint(cache, wanted)
    for shard in manifest.shards:
        write_cache_shard(cache, shard.name, [_encoded(t, source, data.holes) for t in read_shard(data.shards, shard)])


def _triples():
    random = np.random.default_rng(0)
    for index in range(14):
        group, eye = ("Control", "T1NoDPN", "T1DPN")[index % 3], "OD" if index % 5 < 3 else None
        image = random.integers(0, 256, (IMAGE_SIZE_PX, IMAGE_SIZE_PX), dtype=np.uint8)
        meta = TripleMeta(prompt_for(group, eye, {}), group, f"s{index}", eye, 400 / 384, "phantom", {}, {})
        yield "train" if index < 11 else "val", Triple(f"k{index:02d}", image, image > 250, meta)


def _encoded(triple, source, holes):
    length = WITHOUT_EYE if triple.meta.eye is None else WITH_EYE
    latents = (16, IMAGE_SIZE_PX // 8, IMAGE_SIZE_PX // 8)
    shapes = [(length, 64), (7, 64), latents, latents]
    tensors = [torch.randn(shape, generator=source) for shape in shapes]
    if holes is not None:
        found = holes_of(triple, holes, IMAGE_SIZE_PX)
        tensors.append(torch.randn((len(found), *latents), generator=source))
        tensors.append(torch.from_numpy(packed(found)))
        tensors.append(torch.from_numpy(layout_of(triple.nerve_mask.astype(np.uint8))))
    return EncodedSample(triple.key, triple.meta.clinical_group, triple.meta.subject, *tensors)
