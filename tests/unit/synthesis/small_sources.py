"""Masks, a cache that is written by hand and settings: what the sets of these tests are drawn from."""

import numpy as np
import torch

from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.data.cache_index import cache_folder, commit_fingerprint, fingerprint
from ccmdist.data.holes import holes_of, packed
from ccmdist.data.latent_cache import EncodedSample, write_cache_shard
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple, TripleMeta, prompt_for
from ccmdist.data.views import views
from ccmdist.models.model_folder import ModelFolder

SOURCE_PX, SIZE_PX = 96, 64
GROUPS = ("Control", "T1NoDPN", "T1DPN", None)


def source_triples():
    """Five test samples in two shards, one of them without a known eye, and two of train."""
    random = np.random.default_rng(0)
    for index in range(7):
        group, eye = GROUPS[index % 4], None if index == 2 else "OD"
        image = random.integers(0, 256, (SOURCE_PX, SOURCE_PX), dtype=np.uint8)
        nerve_mask = np.zeros((SOURCE_PX, SOURCE_PX), dtype=bool)
        nerve_mask[10 * index + 5 : 10 * index + 8, : 60 + index] = True
        labels = {"cnfl": 12.5}
        meta = TripleMeta(prompt_for(group, eye, {}), group, f"s{index}", eye, 400 / 384, "phantom", {}, labels)
        yield "test" if index < 5 else "train", Triple(f"k{index}", image, nerve_mask, meta)


def encoded(triple, random, holes):
    """Random embeddings and latents; the prompt without an eye is shorter."""
    length = 9 if triple.meta.eye is None else 12
    with_holes = {}
    if holes is not None:
        cut = holes_of(triple, holes, SIZE_PX)
        holed_latents = torch.randn(len(cut), 16, SIZE_PX // 8, SIZE_PX // 8, generator=random)
        with_holes = {"holed_latents": holed_latents, "holes": torch.from_numpy(packed(cut))}
    tensors = [
        torch.randn(length, 64, generator=random),
        torch.randn(7, 64, generator=random),
        torch.randn(16, SIZE_PX // 8, SIZE_PX // 8, generator=random),
        torch.randn(16, SIZE_PX // 8, SIZE_PX // 8, generator=random),
    ]
    return EncodedSample(triple.key, triple.meta.clinical_group, triple.meta.subject, *tensors, **with_holes)


def write_cache(data, manifest):
    """What `ccmdist precompute` would write, with made-up tensors."""
    wanted = fingerprint(data, manifest.digest, ModelFolder.open(data.model).encoder_identity())
    folder, random = cache_folder(data, wanted), torch.Generator().manual_seed(0)
    commit_fingerprint(folder, wanted)
    for shard in manifest.shards:
        flips = data.flips if shard.split == "train" else ()
        frames = [view for t in read_shard(data.shards, shard) for view in views(t, SIZE_PX, flips, "")]
        write_cache_shard(folder, shard.name, [encoded(frame, random, data.holes) for frame in frames])


def config_for(sources, out, *overrides):
    """Ten images of test masks in five batches and three shards, unless ``overrides`` say otherwise."""
    return load(
        SynthesizeConfig,
        [],
        [
            f"out={out}",
            f"data.shards={sources}/shards",
            f"data.model={sources}/model",
            f"data.cache={sources}/cache",
            f"data.image_size_px={SIZE_PX}",
            "data.dtype=fp32",
            "images_per_mask=2",
            "batch_size=2",
            "batches_per_shard=2",
            "denoise_steps=2",
            "guidance_scale=3",
            *overrides,
        ],
    )
