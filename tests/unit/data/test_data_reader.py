"""A tar is read only if it is the one that its manifest names; all else is told by shard and sample."""

import hashlib
import io
import json
import shutil
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from datasets import disable_progress_bars, load_dataset
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.cli import exit_code
from ccmdist.data.manifest import MANIFEST, commit_manifest, read_manifest
from ccmdist.data.reader import read_shard, read_split, verify_set
from ccmdist.data.writer import write_set, write_shard
from ccmdist.errors import ShardError

TRAIN = "train-000000.tar"
FIRST, SECOND = "t1dpn-0001-00", "t1dpn-0001-01"


def first_shard(folder):
    return read_manifest(folder).of_split("train")[0]


def keys_of(folder, name=TRAIN):
    with tarfile.open(folder / name) as tar:
        return [member.removesuffix(".json") for member in tar.getnames() if member.endswith(".json")]


def rewritten(folder, change, name=TRAIN, recommit=True):
    """Write a tar anew from a changed list of (TarInfo, bytes); the manifest then says that this is the right one."""
    with tarfile.open(folder / name) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(folder / name, "w", format=tarfile.GNU_FORMAT) as tar:
        for info, data in change(members):
            tar.addfile(info, io.BytesIO(data))
    if recommit:
        trusted(folder, name)


def trusted(folder, name=TRAIN, **changes):
    manifest = read_manifest(folder)
    data = (folder / name).read_bytes()
    now = {"num_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} | changes
    entries = [replace(shard, **now) if shard.name == name else shard for shard in manifest.shards]
    commit_manifest(folder, manifest.kind, entries, manifest.about)


def member(name, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def told(folder):
    with pytest.raises(ShardError) as error:
        verify_set(folder)
    return str(error.value).removeprefix(f"{folder}/")


def test_a_set_is_read_in_its_order_and_reported(phantoms):
    manifest = read_manifest(phantoms)
    triples = list(read_split(phantoms, "train"))
    assert [triple.key for triple in triples] == keys_of(phantoms) + keys_of(phantoms, "train-000001.tar")
    assert {triple.meta.source for triple in triples} == {"phantom"}
    assert str(verify_set(phantoms)) == (
        f"{phantoms}: phantom set, 6 shards, 18 samples, {sum(shard.num_bytes for shard in manifest.shards)} bytes; "
        "train 6 of 3 subjects, val 6 of 3 subjects, test 6 of 3 subjects; Control 6, T1DPN 6, T1NoDPN 6"
    )


def test_verify_answers_with_exit_codes(phantoms, damaged, capsys):
    assert exit_code(["shards", "verify", str(phantoms)]) == 0
    assert "18 samples" in capsys.readouterr().out
    (damaged / TRAIN).unlink()
    assert exit_code(["shards", "verify", str(damaged)]) == 78
    assert f"{damaged / TRAIN}: No such file or directory, but manifest.json names it" in capsys.readouterr().err


def test_webdataset_and_hugging_face_read_as_many_samples_with_the_same_contents(phantoms, tmp_path):
    disable_progress_bars()
    files = [str(phantoms / shard.name) for shard in read_manifest(phantoms).of_split("train")]
    triples = list(read_split(phantoms, "train"))
    others = {
        "webdataset": list(webdataset.WebDataset(files, shardshuffle=False)),
        "streamed": list(load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True)),
        "mapped": list(load_dataset("webdataset", data_files={"train": files}, split="train", cache_dir=str(tmp_path))),
    }
    for name, samples in others.items():
        assert [sample["__key__"] for sample in samples] == [triple.key for triple in triples], name
    for triple, plain, streamed in zip(triples, others["webdataset"], others["streamed"], strict=True):
        assert json.loads(plain["json"])["subject"] == triple.meta.subject
        assert streamed["json"]["prompt"] == triple.meta.prompt
        np.testing.assert_array_equal(np.asarray(streamed["image.png"]), triple.image)
        np.testing.assert_array_equal(np.asarray(streamed["mask.png"]) == 255, triple.nerve_mask)


def test_a_truncated_tar_gives_no_sample_and_says_how_far_it_goes(damaged):
    entry = first_shard(damaged)
    data = (damaged / TRAIN).read_bytes()
    (damaged / TRAIN).write_bytes(data[:7000])
    read = []
    with pytest.raises(ShardError) as error:
        read.extend(read_shard(damaged, entry))
    assert read == []
    assert str(error.value).startswith(
        f"{damaged / TRAIN}: 7000 bytes, expected {len(data)} bytes; 1 samples can be read, then: "
    )
    assert f"the tar ends within member {SECOND}" in str(error.value)
    assert told(damaged) == str(error.value).removeprefix(f"{damaged}/")


def test_a_flipped_bit_is_blamed_on_its_sample(damaged):
    data = bytearray((damaged / TRAIN).read_bytes())
    with tarfile.open(damaged / TRAIN) as tar:
        info = tar.getmember(f"{keys_of(damaged)[2]}.image.png")
    data[info.offset_data + info.size // 2] ^= 4
    (damaged / TRAIN).write_bytes(data)
    assert (
        f"2 samples can be read, then: sample {keys_of(damaged)[2]}: image.png is not a PNG that can be read"
        in told(damaged)
    )


def test_damage_that_no_member_shows_is_found_by_the_hash(damaged):
    rewritten(damaged, lambda members: [*members[3:6], *members[:3], *members[6:]], recommit=False)
    assert "4 samples can be read, but are not proven to be those that were written" in told(damaged)


@given(data=st.data())
def test_random_damage_never_gives_a_wrong_sample(phantoms, data):
    original = (phantoms / TRAIN).read_bytes()
    damage = data.draw(st.sampled_from(["flip", "cut", "zero", "repeat", "append"]))
    place = data.draw(st.integers(0, len(original) - 1))
    if damage == "flip":
        changed = (
            original[:place] + bytes([original[place] ^ 1 << data.draw(st.integers(0, 7))]) + original[place + 1 :]
        )
    elif damage == "cut":
        changed = original[:place]
    elif damage == "zero":
        length = data.draw(st.integers(1, 2048))
        changed = original[:place] + bytes(len(original[place : place + length])) + original[place + length :]
    elif damage == "repeat":
        changed = original[:place] + original
    else:
        changed = original + data.draw(st.binary(min_size=1, max_size=600))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TRAIN).write_bytes(changed)
        shutil.copy(phantoms / MANIFEST, folder)
        read = []
        try:
            read.extend(read_shard(Path(folder), first_shard(Path(folder))))
        except ShardError as error:
            assert read == []
            assert TRAIN in str(error)
        else:
            assert changed == original


@given(data=st.data())
def test_random_damage_that_the_manifest_vouches_for_ends_in_a_message_or_in_well_formed_samples(phantoms, data):
    changed = bytearray((phantoms / TRAIN).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    entry = replace(first_shard(phantoms), sha256=hashlib.sha256(changed).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TRAIN).write_bytes(changed)
        try:
            assert len(list(read_shard(Path(folder), entry))) == entry.num_samples
        except ShardError as error:
            assert TRAIN in str(error)


HOSTILE = [
    (member("../../etc/passwd.image.png"), "is not a key"),
    (member("/tmp/x.json"), "is not a key"),
    (member("a b.json"), "'a b' is not a key"),
    (member("ä.json"), "is not the header of a member"),
    (member("K.json"), "'K' is not a key"),
    (
        member("k.pkl", b"cos\nsystem\n(S'touch x'\ntR."),
        "sample k: unknown member 'k.pkl', expected image.png, mask.png",
    ),
    (member("k.pyd", b"x"), "sample k: unknown member 'k.pyd'"),
    (member("k.image.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "member 'k.image.png' is no plain file"),
    (member("k.image.png", type=tarfile.LNKTYPE, linkname=f"{FIRST}.image.png"), "is no plain file (type b'1')"),
    (member("k.image.png", type=tarfile.CHRTYPE), "is no plain file (type b'3')"),
    (member("k", type=tarfile.DIRTYPE), "is no plain file (type b'5')"),
    (member("k" * 120 + ".json"), "is no plain file"),
    (member("pipe:touch x.json"), "is not a key"),
]


@pytest.mark.parametrize(("hostile", "message"), HOSTILE)
def test_what_no_sample_has_is_refused_even_if_the_manifest_vouches_for_it(damaged, hostile, message):
    rewritten(damaged, lambda members: [*members, hostile])
    text = told(damaged)
    assert text.startswith(TRAIN)
    assert message in text


def test_a_member_of_absurd_size_is_not_read(damaged):
    header = tarfile.TarInfo("k.image.png")
    header.size = 1 << 40
    (damaged / TRAIN).write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    trusted(damaged)
    assert f"member k.image.png has {1 << 40} bytes, expected at most" in told(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members[:1] + members[2:], f"sample {FIRST}: mask.png is missing before json"),
        (lambda members: members[1:], f"sample {FIRST}: image.png is missing before mask.png"),
        (lambda members: members[:-1], "json is missing; make or copy the shard anew"),
        (
            lambda members: [members[1], members[0], *members[2:]],
            f"sample {FIRST}: image.png is missing before mask.png",
        ),
        (lambda members: members[:-3], "has samples 3, manifest.json says 4; make the set again"),
        (lambda members: members[:9] + members[:3], f"sample {FIRST} is there twice"),
    ],
)
def test_a_sample_that_is_not_whole_is_named(damaged, change, message):
    assert keys_of(damaged)[0] == FIRST
    rewritten(damaged, change)
    assert message in told(damaged)


def test_what_the_samples_add_up_to_is_compared_with_the_manifest(damaged):
    trusted(damaged, group_counts={"Control": 4})
    assert told(damaged).startswith("train-000000.tar: has groups {'Control': 2, 'T1DPN': 2}, manifest.json says")
    trusted(damaged, subjects=("someone",))
    assert "has subjects ['control-0002', 't1dpn-0001'], manifest" in told(damaged)


def test_a_key_in_two_shards_and_a_sample_of_another_kind_are_refused(phantoms, tmp_path):
    triples = list(read_split(phantoms, "train"))
    entries = [write_shard(tmp_path, f"train-{i:06d}.tar", "train", triples[:2]) for i in range(2)]
    commit_manifest(tmp_path, "phantom", entries)
    assert told(tmp_path) == f"train-000001.tar: sample {FIRST} is in train-000000.tar too; make the set again"
    with pytest.raises(ShardError, match=r"train-000001.tar: sample t1dpn-0001-00 is in another shard too"):
        list(read_split(tmp_path, "train"))
    write_set(tmp_path / "real", "real", (("train", triple) for triple in triples), 9)
    assert f"sample {FIRST}: source phantom in a real set; keep sets of different kinds apart" in told(
        tmp_path / "real"
    )


def test_tars_beside_the_set_are_told_and_all_problems_together(damaged):
    shutil.copy(damaged / TRAIN, damaged / "train-000009.tar")
    (damaged / "val-000000.tar").unlink()
    lines = told(damaged).splitlines()
    assert lines[0] == f"{damaged}: 2 problems"
    assert lines[1] == f"  {damaged}/train-000009.tar: is a tar that manifest.json does not name"
    assert lines[2].startswith(f"  {damaged}/val-000000.tar: No such file or directory")


def test_a_split_that_the_set_does_not_have_is_told(phantoms, tmp_path):
    write_set(tmp_path, "phantom", (("train", triple) for triple in read_split(phantoms, "train")), 9)
    with pytest.raises(ShardError, match="the set has no val split; make it with a val fraction above zero"):
        list(read_split(tmp_path, "val"))
