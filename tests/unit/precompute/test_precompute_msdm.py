"""A cache filled by the encoders of an MSDM: scaled latents of images, latents of masks, and texts without pictures."""

import numpy as np
import pytest
import torch

from ccmdist.ccm.prompts import NEGATIVE_PROMPT
from ccmdist.config.data import DataSettings, PhantomShardsConfig, PrecomputeConfig
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.errors import CacheError
from ccmdist.jobs.precompute import describe
from ccmdist.models.encoder_choice import load_encoders
from ccmdist.precompute.fill import fill_cache
from tests.small_msdm import make_small_msdm

SIZE_PX = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Settings of a cache, the folder of its encoders, and the cache, filled."""
    folder = tmp_path_factory.mktemp("msdm")
    write_phantom_set(
        PhantomShardsConfig(out=folder / "shards", subjects_per_group=1, frames_per_subject=2, size_px=SIZE_PX)
    )
    model = make_small_msdm(folder / "model")
    data = DataSettings(
        shards=folder / "shards", model=model.path, cache=folder / "cache", image_size_px=SIZE_PX, dtype="fp32"
    )
    settings = PrecomputeConfig(data=data, splits=("train",))
    told = describe(settings)
    fill_cache(settings, 0, 1)
    return settings, model, told, LatentCache.open(data, model.encoder_identity(), ("train",))


def test_a_dry_run_says_whose_encoders_they_are(world):
    assert world[2].endswith("samples are to be encoded by MSDM")


def test_each_sample_has_what_the_encoders_make_of_it(world):
    settings, model, _, cache = world
    text, codec = load_encoders(model, torch.float32, "cpu")
    triples = {triple.key: triple for triple in read_split(settings.data.shards, "train")}
    for entry in cache.entries("train"):
        triple, found = triples[entry.key], cache.read(entry)
        mask = triple.nerve_mask.astype(np.uint8) * 255
        assert entry.num_text_tokens == 48, "all texts are padded to one length"
        assert torch.equal(found["prompt_embeds"], text.encode([triple.meta.prompt], [])[0])
        assert torch.equal(cache.read_negative(entry), text.encode([NEGATIVE_PROMPT], [])[0])
        for name, expected in (
            ("image_latents", codec.encode(triple.image[None])[0]),
            ("mask_latents", codec.encode(mask[None])[0] / 2.0),
        ):
            assert found[name].shape == (4, SIZE_PX // 4, SIZE_PX // 4)
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-5)


def test_a_cache_of_another_vae_is_not_taken_for_this_one(world, tmp_path):
    settings = world[0]
    other = make_small_msdm(tmp_path / "other", seed=1)
    data = settings.data.model_copy(update={"model": other.path})
    with pytest.raises(CacheError, match=r"holds no cache for these settings; .* differs in encoders.vae_weights \("):
        LatentCache.open(data, other.encoder_identity(), ("train",))
    again = make_small_msdm(tmp_path / "again")
    assert LatentCache.open(settings.data, again.encoder_identity(), ("train",)), "wherever the same one lies"
