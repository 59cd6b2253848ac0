"""A small source set with a tiny model and a cache that is written by hand: prompts of two lengths, no encoder."""

from functools import cache

import numpy as np
import pytest
from files_of_sets import images_of
from small_sources import config_for, source_triples, write_cache

from ccmdist.data.manifest import read_manifest
from ccmdist.data.writer import write_set
from ccmdist.models import mmdit
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import generate
from ccmdist.synthesis.planning import UNTUNED, make_plan


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """Folder with shards/, model/ and cache/."""
    folder = tmp_path_factory.mktemp("sources")
    manifest = write_set(folder / "shards", "phantom", source_triples(), 3)
    make_model("tiny", "2509", folder / "model", seed=0)
    for flips in ("[]", "[hflip]"):
        write_cache(config_for(folder, folder / "out", f"data.flips={flips}").data, manifest)
    return folder


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
    monkeypatch.setattr(LatentCodec, "load", cache(LatentCodec.load))


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
