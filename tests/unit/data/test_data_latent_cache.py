"""A cache gives back the tensors that were written, or says which shard and key are not, and what command mends it."""

import errno
import json
import os
import shutil
import tarfile
from dataclasses import replace

import pytest
import torch

from ccmdist.commit import digest_of
from ccmdist.config.data import DataSettings, HoleSettings
from ccmdist.data.cache_index import (
    cache_folder,
    command,
    commit_fingerprint,
    fingerprint,
    index_path,
    is_committed,
    read_index,
)
from ccmdist.data.latent_cache import EncodedSample, LatentCache, write_cache_shard
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.reader import read_shard
from ccmdist.data.triple import prompt_for
from ccmdist.data.writer import write_shard
from ccmdist.errors import CacheError

ENCODERS = {"version": "2509", "vae_weights": "a" * 64}
TRAIN = "train-000000.tar"


def encoded(key, clinical_group="Control", subject="s1", number=0):
    rng = torch.Generator().manual_seed(number)
    tensors = [torch.randn(shape, generator=rng) for shape in ((5 + number % 2, 4), (5, 4), (3, 2, 2), (3, 2, 2))]
    return EncodedSample(key, clinical_group, subject, *tensors)


TEXTS, NEGATIVE_TEXT = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(9)), torch.zeros(5, 400)


def sharing(sample, shares_text=True):
    """The sample as an encoder makes it that sees no pictures: with one of two texts, by its group."""
    number = int(sample.clinical_group == "Control")
    texts = {"prompt_embeds": TEXTS[number], "negative_prompt_embeds": NEGATIVE_TEXT}
    pooled = {"pooled_prompt_embeds": TEXTS[number][0].clone(), "negative_pooled_prompt_embeds": torch.zeros(400)}
    return replace(sample, **texts, **pooled, shares_text=shares_text)


def fill(data, encoders=ENCODERS, splits=("train", "val", "test"), of=lambda sample: sample):
    """A cache of hand-made tensors for every sample of the set; tensors by key."""
    manifest = read_manifest(data.shards)
    wanted = fingerprint(data, manifest.digest, encoders)
    folder, written = cache_folder(data, wanted), {}
    commit_fingerprint(folder, wanted)
    for shard in [shard for split in splits for shard in manifest.of_split(split)]:
        triples = list(read_shard(data.shards, shard))
        samples = [
            of(encoded(triple.key, triple.meta.clinical_group, triple.meta.subject, len(written) + number))
            for number, triple in enumerate(triples)
        ]
        write_cache_shard(folder, shard.name, samples)
        written |= {sample.key: sample for sample in samples}
    return folder, written


@pytest.fixture
def data(phantoms, tmp_path):
    return DataSettings(shards=phantoms, model=tmp_path / "model", cache=tmp_path / "cache", image_size_px=64)


def test_tensors_come_back_bit_for_bit_with_group_and_subject(data):
    folder, written = fill(data)
    cache = LatentCache.open(data, ENCODERS)
    assert cache.folder == folder
    entries = [entry for split in ("train", "val", "test") for entry in cache.entries(split)]
    assert [entry.key for entry in entries] == list(written)
    for entry in entries:
        sample, found = written[entry.key], cache.read(entry)
        assert found.keys() == {"prompt_embeds", "image_latents", "mask_latents"}
        assert all(torch.equal(found[name], getattr(sample, name)) for name in found)
        assert torch.equal(cache.read_negative(entry), sample.negative_prompt_embeds)
        assert (entry.clinical_group, entry.subject) == (sample.clinical_group, sample.subject)
        assert entry.num_text_tokens == len(sample.prompt_embeds)
    assert cache.verify().endswith("all intact")
    assert "6 shards, 18 samples" in cache.verify()


def test_dtypes_and_missing_groups_are_kept(tmp_path):
    sample = encoded("k", None)
    bf16 = EncodedSample(
        "k", None, "s1", *(tensor.bfloat16() for tensor in vars(sample).values() if torch.is_tensor(tensor))
    )
    write_cache_shard(tmp_path, TRAIN, [bf16])
    assert read_index(tmp_path, TRAIN).entries[0].clinical_group is None
    assert b"BF16" in (tmp_path / TRAIN).read_bytes()


def test_equal_samples_give_equal_bytes(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_cache_shard(folder, TRAIN, [encoded("k", number=3), encoded("l"), sharing(encoded("m"))])
    for name in (TRAIN, "train-000000.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_texts_that_samples_share_are_in_a_tar_once_and_come_back_as_if_they_were_not(data, tmp_path):
    found = {}
    for shares in (True, False):
        own = data.model_copy(update={"cache": tmp_path / str(shares)})
        folder, _ = fill(own, of=lambda sample, shares=shares: sharing(sample, shares))
        cache = LatentCache.open(own, ENCODERS)
        entries = [entry for split in ("train", "val", "test") for entry in cache.entries(split)]
        assert {entry.text is not None for entry in entries} == {shares}
        assert {entry.num_text_tokens for entry in entries} == {5}
        tensors = [(entry.key, cache.read(entry), cache.read_negatives(entry)) for entry in entries]
        assert cache.verify().endswith("all intact")
        found[shares] = tensors, sum(tar.stat().st_size for tar in folder.glob("*.tar")), folder
    (shared, num_shared, folder), (separate, num_separate, _) = found.values()
    for (key, sample, negative), (same, expected, expected_negative) in zip(shared, separate, strict=True):
        assert key == same
        assert sample.keys() == expected.keys()
        assert negative.keys() == expected_negative.keys()
        assert all(torch.equal(sample[name], tensor) for name, tensor in expected.items())
        assert all(torch.equal(negative[name], tensor) for name, tensor in expected_negative.items())
    with tarfile.open(folder / TRAIN) as tar:
        names = tar.getnames()
    texts = [name for name in names if name.startswith("text-")]
    groups = {entry.clinical_group == "Control" for entry in read_index(folder, TRAIN).entries}
    assert len(texts) == len(set(texts)) == len(groups) + 1, "one for each prompt and one for the negative prompt"
    assert num_shared < 0.7 * num_separate


def test_damage_to_a_shared_text_is_told(data):
    folder, _ = fill(data, of=sharing)
    entry = read_index(folder, TRAIN).entries[0]
    with (folder / TRAIN).open("r+b") as tar:
        tar.seek(entry.text.offset + entry.text.size - 1)
        tar.write(b"\x55")
    cache = LatentCache.open(data, ENCODERS)
    with pytest.raises(CacheError, match=rf"{TRAIN}: the text of {entry.key} is damaged; remove .*run `ccmdist prec"):
        cache.read(cache.entries("train")[0])


def test_two_samples_with_one_key_are_refused_and_leave_nothing(tmp_path):
    with pytest.raises(CacheError, match=r"train-000000.tar: two samples have the key k; give one of them another key"):
        write_cache_shard(tmp_path, TRAIN, [encoded("k"), encoded("k")])
    assert list(tmp_path.iterdir()) == []


def test_a_shard_is_committed_when_its_index_fits_it(tmp_path):
    assert not is_committed(tmp_path, TRAIN)
    write_cache_shard(tmp_path, TRAIN, [encoded("k")])
    assert is_committed(tmp_path, TRAIN)
    with (tmp_path / TRAIN).open("ab") as tar:
        tar.write(b"x")
    assert not is_committed(tmp_path, TRAIN)
    index_path(tmp_path, TRAIN).write_text("{}")
    assert not is_committed(tmp_path, TRAIN)


def test_only_the_splits_that_are_read_have_to_be_there(data):
    fill(data, splits=("train",))
    assert len(LatentCache.open(data, ENCODERS, ("train",)).entries("train")) == 6
    with pytest.raises(CacheError) as error:
        LatentCache.open(data, ENCODERS)
    assert str(error.value).endswith(
        f": 4 of 6 shards are missing (val-000000.tar, val-000001.tar, test-000000.tar, test-000001.tar); "
        f"run `{command(data)}`"
    )


def test_the_command_that_mends_a_cache_is_complete(data, phantoms, tmp_path):
    flipped = data.model_copy(update={"flips": ("hflip", "vflip"), "dtype": "fp32"})
    assert command(flipped) == (
        f"ccmdist precompute data.shards={phantoms} data.model={tmp_path}/model data.cache={tmp_path}/cache "
        "data.image_size_px=64 data.dtype=fp32 'data.flips=[hflip,vflip]'"
    )


def test_another_setting_model_or_shard_set_is_another_cache_and_says_what_differs(data, damaged):
    fill(data)
    with pytest.raises(CacheError, match=r"holds no cache for these settings; the nearest, .*, differs in "):
        LatentCache.open(data, ENCODERS | {"version": "2511"})
    for changes, expected in (
        ({"image_size_px": 128}, "image_size_px (64, expected 128)"),
        ({"dtype": "fp32"}, "dtype (bf16, expected fp32)"),
        ({"flips": ("rot180",)}, "flips ([], expected ['rot180'])"),
        ({"flips": ("hflip",)}, "eye_follows_flip (none, expected True), flips ([], expected ['hflip'])"),
    ):
        with pytest.raises(CacheError) as error:
            LatentCache.open(data.model_copy(update=changes), ENCODERS)
        assert f"differs in {expected}; run `ccmdist precompute data.shards=" in str(error.value)
    manifest = json.loads((damaged / "manifest.json").read_text())
    shards = read_manifest(damaged).shards[:-1]
    commit_manifest(damaged, "phantom", shards)
    with pytest.raises(CacheError) as error:
        LatentCache.open(data.model_copy(update={"shards": damaged}), ENCODERS)
    assert f"differs in shards ({manifest['digest'][:12]}, expected {read_manifest(damaged).digest[:12]})" in str(
        error.value
    )


def test_no_cache_at_all_says_how_to_make_one(data):
    with pytest.raises(CacheError) as error:
        LatentCache.open(data, ENCODERS)
    assert str(error.value) == f"{data.cache}: holds no cache for these settings; run `{command(data)}`"


def test_where_a_set_lies_and_the_order_of_flips_do_not_count(data, phantoms):
    def of(**changes):
        return fingerprint(data.model_copy(update=changes), read_manifest(phantoms).digest, ENCODERS)

    assert of(shards="elsewhere", model="elsewhere", cache="elsewhere") == of()
    assert of(flips=("vflip", "hflip", "vflip")) == of(flips=("hflip", "vflip"))


def test_usual_settings_have_the_fingerprint_that_they_had_before_structures_and_holes_existed(phantoms, tmp_path):
    set_of(phantoms, tmp_path, lambda eye: None)

    def of(**changes):
        data = DataSettings(shards=tmp_path, model="m", image_size_px=384, flips=("hflip",), **changes)
        return digest_of(fingerprint(data, "b" * 64, ENCODERS))

    usual = "fb32b64a8bfbb8cbcf063f62ba1b45e5c053f28800771740218eb18d989969cb"
    assert of() == of(structure="mask", holes=None) == usual
    others = [
        of(structure="points"),
        of(structure="mask_and_points"),
        of(prompts="next_group"),
        *(of(holes=HoleSettings(**changes)) for changes in ({}, {"seed": 1}, {"per_sample": 1}, {"shapes": ("band",)})),
    ]
    assert len({usual, *others}) == 8


def set_of(phantoms, folder, eye_of):
    """The samples of a set under the eyes that ``eye_of`` makes of theirs; its manifest."""
    entries = []
    for shard in read_manifest(phantoms).shards:
        changed = []
        for triple in read_shard(phantoms, shard):
            meta, eye = triple.meta, eye_of(triple.meta.eye)
            prompt = prompt_for(meta.clinical_group, eye, meta.fields)
            changed.append(replace(triple, meta=replace(meta, eye=eye, prompt=prompt)))
        entries.append(write_shard(folder, shard.name, shard.split, changed))
    return commit_manifest(folder, "phantom", entries)


def test_prompts_of_mirrored_views_are_other_contents_only_where_a_frame_to_train_on_names_its_eye(phantoms, tmp_path):
    seen = {"of_both": phantoms}
    for name, eye_of in (("unknown", lambda eye: None), ("some", lambda eye: "OS" if eye == "OS" else None)):
        seen[name] = tmp_path / name
        set_of(phantoms, seen[name], eye_of)

    def follows(name, *flips):
        data = DataSettings(shards=seen[name], model="m", image_size_px=64, flips=flips)
        return fingerprint(data, read_manifest(seen[name]).digest, ENCODERS).get("eye_follows_flip")

    for name in ("of_both", "some"):
        assert [follows(name, *flips) for flips in ((), ("rot180",), ("vflip",), ("rot180", "hflip"))] == [
            None,
            None,
            True,
            True,
        ]
    assert follows("unknown", "hflip", "vflip", "rot180") is None


def test_tensors_of_holes_are_there_only_where_they_were_given(tmp_path):
    plain = encoded("k")
    with_holes = replace(
        encoded("l"),
        holed_latents=torch.randn(2, 3, 2, 2),
        holes=torch.randint(0, 256, (2, 16, 2), dtype=torch.uint8),
        layout=torch.zeros(1, 1, dtype=torch.uint8),
    )
    write_cache_shard(tmp_path, TRAIN, [plain, with_holes])
    cache = LatentCache(tmp_path, "", None, {}, [])
    first, second = (cache.read(entry) for entry in read_index(tmp_path, TRAIN).entries)
    assert first.keys() == {"prompt_embeds", "image_latents", "mask_latents"}
    assert second.keys() == first.keys() | {"holed_latents", "holes", "layout"}
    assert all(torch.equal(tensor, getattr(with_holes, name)) for name, tensor in second.items())


def test_a_flipped_bit_is_told_with_shard_key_and_remedy(data):
    folder, _ = fill(data)
    cache = LatentCache.open(data, ENCODERS)
    entry = cache.entries("train")[1]
    contents = bytearray((folder / TRAIN).read_bytes())
    contents[entry.sample.offset + entry.sample.size - 1] ^= 1
    (folder / TRAIN).write_bytes(contents)
    for attempt in (lambda: cache.read(entry), cache.verify):
        with pytest.raises(CacheError) as error:
            attempt()
        assert str(error.value) == (
            f"{folder / TRAIN}: member {entry.key}.safetensors is damaged; "
            f"remove {folder / 'train-000000.json'} and run `{command(data)}`"
        )
    assert cache.read(cache.entries("train")[0])


def test_damage_between_the_samples_is_found_by_verify(data):
    folder, _ = fill(data)
    contents = bytearray((folder / TRAIN).read_bytes())
    contents[136] ^= 1
    (folder / TRAIN).write_bytes(contents)
    with pytest.raises(CacheError, match="differs from its index between the samples"):
        LatentCache.open(data, ENCODERS).verify()


def test_a_tar_that_vanished_or_is_cut_is_told_when_the_cache_is_opened(data):
    folder, _ = fill(data)
    contents = (folder / TRAIN).read_bytes()
    (folder / TRAIN).write_bytes(contents[:-1])
    with pytest.raises(CacheError, match=rf"has {len(contents) - 1} bytes, expected {len(contents)}; run `ccmdist"):
        LatentCache.open(data, ENCODERS)
    (folder / TRAIN).unlink()
    with pytest.raises(CacheError, match=r"train-000000.tar: is missing; run `ccmdist precompute"):
        LatentCache.open(data, ENCODERS)


def test_an_index_of_another_shard_or_with_too_few_samples_is_refused(data):
    folder, _ = fill(data)
    index = index_path(folder, TRAIN)
    good = index.read_text()
    shutil.copy(folder / "train-000001.tar", folder / TRAIN)
    shutil.copy(index_path(folder, "train-000001.tar"), index)
    with pytest.raises(
        CacheError, match=r"lists 2 samples of train-000001.tar, expected 4 of train-000000.tar; remove"
    ):
        LatentCache.open(data, ENCODERS)
    index.write_text(good[:100])
    with pytest.raises(CacheError, match=r"train-000000.json: is not an index of a cached shard"):
        LatentCache.open(data, ENCODERS)


def test_a_file_system_that_fails_is_not_taken_for_a_damaged_cache(data, monkeypatch):
    fill(data)
    cache = LatentCache.open(data, ENCODERS, ("val",))

    def fail(path, member):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr("ccmdist.data.latent_cache._read_range", fail)
    with pytest.raises(OSError, match="Stale file handle"):
        cache.read(cache.entries("val")[0])


def first_of_val(cache):
    entry = cache.entries("val")[0]
    return entry.key, cache.read(entry)["image_latents"].tolist()


def test_a_cache_can_be_handed_to_other_processes(data, forkserver):
    _, written = fill(data)
    with forkserver.Pool(1) as pool:
        key, latents = pool.apply(first_of_val, (LatentCache.open(data, ENCODERS),))
    assert latents == written[key].image_latents.tolist()
