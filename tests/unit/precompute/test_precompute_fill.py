"""Filling a cache with the tiny encoders: what is in it does not depend on who filled it, when and how often."""

import logging
import shutil

import numpy as np
import pytest
import torch

from ccmdist.ccm.prompts import NEGATIVE_PROMPT
from ccmdist.config.data import DataSettings, PhantomShardsConfig, PrecomputeConfig
from ccmdist.data.cache_index import CONTENT_VERSION, index_path
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.triple import OTHER_EYE, prompt_for
from ccmdist.errors import CacheError, Preempted, ShardError
from ccmdist.models.encoders import LatentCodec, PromptEncoder
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.precompute.fill import Encoders, fill_cache
from ccmdist.precompute.plan import fill_plan

SIZE_PX = 64


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder with 9 phantoms in 6 shards, and the tiny model."""
    folder = tmp_path_factory.mktemp("precompute")
    fractions = {"val_fraction": 0.3, "test_fraction": 0.3}
    write_phantom_set(
        PhantomShardsConfig(
            out=folder / "shards",
            subjects_per_group=3,
            frames_per_subject=1,
            size_px=SIZE_PX,
            samples_per_shard=2,
            **fractions,
        )
    )
    make_model("tiny", "2509", folder / "model")
    return folder


def config(world, cache, splits=("train", "val", "test"), batch_size=3, **changes):
    values = {"model": world / "model", "image_size_px": SIZE_PX, "dtype": "fp32", "flips": ("hflip",)} | changes
    data = DataSettings(shards=world / "shards", cache=cache, **values)
    return PrecomputeConfig(data=data, splits=splits, batch_size=batch_size)


@pytest.fixture(scope="module")
def filled(world, tmp_path_factory):
    """The settings of a cache that one worker filled without a break, and its folder."""
    settings = config(world, tmp_path_factory.mktemp("cache"))
    return settings, fill_cache(settings, 0, 1)


def opened(settings, splits=("train", "val", "test")):
    return LatentCache.open(settings.data, ModelFolder.open(settings.data.model).encoder_identity(), splits)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_cache_holds_every_sample_and_flips_of_train_only(filled):
    cache = opened(filled[0])
    train = [triple.key for triple in read_split(filled[0].data.shards, "train")]
    assert [entry.key for entry in cache.entries("train")] == [name for key in train for name in (key, f"{key}-hflip")]
    for split in ("val", "test"):
        keys = [triple.key for triple in read_split(filled[0].data.shards, split)]
        assert [entry.key for entry in cache.entries(split)] == keys
    cache.verify()


def test_the_cache_holds_what_the_encoders_give_one_by_one(filled):
    settings, _ = filled
    model = ModelFolder.open(settings.data.model)
    prompts = PromptEncoder.load(model, torch.float32, "cpu")
    codec = LatentCodec.load(model, torch.float32, "cpu")
    cache = opened(settings)
    entries = {entry.key: entry for entry in cache.entries("train")}
    for triple in list(read_split(settings.data.shards, "train"))[:2]:
        eye = triple.meta.eye
        for key, flip, seen in (
            (triple.key, slice(None), eye),
            (f"{triple.key}-hflip", slice(None, None, -1), OTHER_EYE[eye]),
        ):
            prompt = prompt_for(triple.meta.clinical_group, seen, {})
            image, mask = triple.image[:, flip].copy(), triple.nerve_mask[:, flip].astype(np.uint8) * 255
            found = cache.read(entries[key])
            expected = {
                "prompt_embeds": prompts.encode([prompt], [mask])[0],
                "image_latents": codec.encode(image[None])[0],
                "mask_latents": codec.encode(mask[None])[0],
            }
            for name, tensor in expected.items():
                # Batched and single matrix products differ in the last bits of fp32.
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
            negative = prompts.encode([NEGATIVE_PROMPT], [mask])[0]
            torch.testing.assert_close(cache.read_negative(entries[key]), negative, rtol=1e-4, atol=1e-5)
            assert (entries[key].clinical_group, entries[key].subject) == (
                triple.meta.clinical_group,
                triple.meta.subject,
            )


def test_any_number_of_workers_gives_the_same_bytes(world, filled, tmp_path):
    settings = config(world, tmp_path)
    for worker in (2, 0, 1):
        folder = fill_cache(settings, worker, 3)
    assert folder.name == filled[1].name
    assert files_of(folder) == files_of(filled[1])


def test_two_workers_with_one_share_write_the_same_bytes_at_the_same_time(world, filled, tmp_path, monkeypatch):
    settings, encoded = config(world, tmp_path), Encoders.encoded

    def overtaken(self, shard):
        samples = encoded(self, shard)
        yield next(samples)
        # While this tar is half written, another process fills the whole cache.
        monkeypatch.setattr(Encoders, "encoded", encoded)
        fill_cache(settings, 0, 1)
        yield from samples

    monkeypatch.setattr(Encoders, "encoded", overtaken)
    folder = fill_cache(settings, 0, 1)
    assert Encoders.encoded is encoded, "the race was not staged"
    assert files_of(folder) == files_of(filled[1])


def test_a_worker_ends_with_how_far_the_cache_is(world, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("ccmdist"), "propagate", True)
    settings = config(world, tmp_path, splits=("val", "test"))
    with caplog.at_level(logging.INFO, "ccmdist"):
        folder = fill_cache(settings, 0, 2)
        assert caplog.messages[-1] == (
            f"{folder}: 2 of 4 shards are committed; other workers encode the rest, or the same command run again"
        )
        fill_cache(settings, 1, 2)
        assert caplog.messages[-1] == f"{folder}: complete, 4 shards"


def test_an_interrupted_run_keeps_what_it_committed_and_goes_on_to_the_same_bytes(world, filled, tmp_path, monkeypatch):
    settings = config(world, tmp_path)
    answers = iter([False, False, True])
    with pytest.raises(Preempted) as stop:
        fill_cache(settings, 0, 1, should_stop=lambda: next(answers))
    assert str(stop.value) == (
        "precompute: stopped with 2 of 6 shards encoded and committed; run the same command again"
    )
    assert stop.value.exit_code == 75
    folder = tmp_path / filled[1].name
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(list(folder.glob("*.tar"))) == 2
    # A kill between a tar and its index, or within a tar, leaves these behind.
    shutil.copy(filled[1] / "val-000000.tar", folder)
    (folder / ".test-000000.tar.tmp-1-abcdef01").write_bytes(b"half a tar")
    fill_cache(settings, 0, 1)
    (folder / ".test-000000.tar.tmp-1-abcdef01").unlink()
    assert files_of(folder) == files_of(filled[1])
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_what_is_committed_is_not_encoded_again(filled, monkeypatch, caplog):
    def refuse(*_):
        raise AssertionError("the encoders were loaded")

    monkeypatch.setattr("ccmdist.precompute.fill.Encoders", refuse)
    monkeypatch.setattr(logging.getLogger("ccmdist"), "propagate", True)
    with caplog.at_level(logging.INFO, "ccmdist"):
        assert fill_cache(filled[0], 0, 1) == filled[1]
    assert "0 of this worker's 6 shards are to be encoded" in caplog.text


def test_a_removed_index_is_the_remedy_for_a_damaged_shard(world, filled, tmp_path):
    folder = tmp_path / filled[1].name
    shutil.copytree(filled[1], folder)
    settings = config(world, tmp_path)
    entry = opened(settings).entries("val")[0]
    contents = bytearray((folder / entry.shard).read_bytes())
    contents[entry.sample.offset + entry.sample.size - 1] ^= 1
    (folder / entry.shard).write_bytes(contents)
    with pytest.raises(CacheError, match=r"is damaged; remove .*val-000000.json and run `ccmdist precompute"):
        opened(settings).read(entry)
    index_path(folder, entry.shard).unlink()
    fill_cache(settings, 0, 1)
    assert files_of(folder) == files_of(filled[1])


def test_another_size_another_model_or_another_prompt_is_another_cache_and_says_what_differs(
    world, filled, tmp_path, monkeypatch
):
    cache = filled[0].data.cache
    with pytest.raises(
        CacheError, match=r"image_size_px \(64, expected 32\); run `ccmdist precompute .*image_size_px=32"
    ):
        opened(config(world, cache, image_size_px=32))
    make_model("tiny", "2509", tmp_path / "other", seed=1)
    with pytest.raises(
        CacheError, match=r"differs in encoders.text_encoder_weights \(\w{12}, expected \w{12}\), encoders.vae"
    ):
        opened(config(world, cache, model=tmp_path / "other"))
    make_model("tiny", "2511", tmp_path / "2511")
    with pytest.raises(CacheError, match=r"differs in encoders.version \(2509, expected 2511\); run"):
        opened(config(world, cache, model=tmp_path / "2511"))
    monkeypatch.setattr("ccmdist.data.cache_index.TEMPLATE_VERSION", 99)
    with pytest.raises(CacheError, match=r"differs in prompt_template \(1, expected 99\)"):
        opened(filled[0])
    monkeypatch.setattr("ccmdist.data.cache_index.CONTENT_VERSION", CONTENT_VERSION + 1)
    with pytest.raises(CacheError, match="differs in content_version"):
        opened(filled[0])


def test_a_split_that_was_not_encoded_is_missed_only_where_it_is_read(world, tmp_path):
    settings = config(world, tmp_path, splits=("val",))
    fill_cache(settings, 0, 1)
    assert len(opened(settings, ("val",)).entries("val")) == 3
    with pytest.raises(CacheError, match=r"2 of 2 shards are missing \(train-000000.tar, train-000001.tar\)"):
        opened(settings, ("train",))


def test_a_damaged_source_shard_is_not_encoded(world, tmp_path):
    shards = shutil.copytree(world / "shards", tmp_path / "shards")
    data = bytearray((shards / "val-000000.tar").read_bytes())
    data[700] ^= 1
    (shards / "val-000000.tar").write_bytes(data)
    settings = config(world, tmp_path / "cache", splits=("val",))
    settings = PrecomputeConfig(data=settings.data.model_copy(update={"shards": shards}), splits=("val",))
    with pytest.raises(ShardError, match=r"val-000000.tar: sha256 \w{12}, expected"):
        fill_cache(settings, 0, 1)
    assert not list((tmp_path / "cache").glob("*/val-000000.*"))


def test_the_plan_writes_nothing_and_shares_the_shards_out(world, filled, tmp_path):
    model = ModelFolder.open(world / "model")
    settings = config(world, tmp_path / "none")
    plans = [fill_plan(settings, model, worker, 4) for worker in range(4)]
    assert not (tmp_path / "none").exists()
    assert sorted(shard.name for plan in plans for shard in plan.open_shards) == sorted(
        shard.name for shard in fill_plan(settings, model).shards
    )
    assert [len(plan.shards) for plan in plans] == [2, 2, 1, 1]
    assert fill_plan(filled[0], model).open_shards == ()
