"""A small source set with a tiny model and a cache that is written by hand: prompts of two lengths, no encoder."""

from functools import cache

import numpy as np
import pytest
import torch
from files_of_sets import images_of

from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.data.cache_index import cache_folder, commit_fingerprint, fingerprint
from ccmdist.data.holes import holes_of, packed
from ccmdist.data.latent_cache import EncodedSample, write_cache_shard
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import Triple, TripleMeta, prompt_for
from ccmdist.data.views import views
from ccmdist.data.writer import write_set
from ccmdist.models import mmdit
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import generate
from ccmdist.synthesis.plan import UNTUNED, make_plan

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


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folder with shards/, model/ and cache/."""
    folder = tmp_path_factory.mktemp("sources")
    manifest = write_set(folder / "shards", "phantom", source_triples(), 3)
    make_model("tiny", "2509", folder / "model", seed=0)
    for flips in ("[]", "[hflip]"):
        write_cache(config_for(folder, folder / "out", f"data.flips={flips}").data, manifest)
    return folder


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


@pytest.fixture
def config(sources, tmp_path):
    """A config with overrides, writing to out/ of the test."""
    made = cache(config_for)  # merging overrides takes longer than planning
    return lambda *overrides, out="out": made(sources, tmp_path / out, *overrides)


@pytest.fixture
def cache_in_bf16(config, tmp_path):
    """A cache of the sources in bf16."""
    wanted = config("base=auto", "data.dtype=bf16", f"data.cache={tmp_path}/cache").data
    write_cache(wanted, read_manifest(wanted.shards))
    return wanted.cache


@pytest.fixture
def plan_of():
    """The plan of a config."""

    def plan_of(config, adapter_digest=UNTUNED, base="fp32"):
        model = ModelFolder.open(config.data.model)
        return make_plan(config, model, model.encoder_identity(), adapter_digest, base)

    return plan_of


@pytest.fixture
def one_model(monkeypatch):
    """Build the model and the VAE once for all runs of a test; none of them may have an adapter, which changes it."""
    monkeypatch.setattr(mmdit, "build", cache(mmdit.build))
    monkeypatch.setattr(generate.LatentCodec, "load", cache(generate.LatentCodec.load))


@pytest.fixture(scope="session")
def drawn(sources, tmp_path_factory):
    """The set that one uninterrupted worker draws."""
    out = tmp_path_factory.mktemp("drawn") / "set"
    assert generate.synthesize(config_for(sources, out), None)
    return out


@pytest.fixture
def remembered(drawn, monkeypatch):
    """Images come from the set that was drawn: for tests of what happens to images, not in them."""
    images = images_of(drawn)

    class Remembered:
        def __init__(self, *_):
            pass

        def draw(self, requests):
            return np.stack([images[request.key] for request in requests])

    monkeypatch.setattr(generate, "ImageSampler", Remembered)
    return Remembered
