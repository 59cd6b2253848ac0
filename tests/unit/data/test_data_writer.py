"""Sets appear whole or not at all, and nothing that is not ours is overwritten."""

import tarfile

import pytest

from ccmdist.data.manifest import MANIFEST, read_manifest
from ccmdist.data.reader import read_split, verify_set
from ccmdist.data.writer import UNFINISHED, existing_set, write_set, write_shard
from ccmdist.errors import ShardError


@pytest.fixture
def triples(phantoms):
    return list(read_split(phantoms, "train"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_equal_samples_give_equal_bytes_without_times_and_owners(triples, tmp_path):
    entries = [write_shard(tmp_path / name, "train-000000.tar", "train", triples) for name in "ab"]
    assert entries[0] == entries[1]
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    with tarfile.open(tmp_path / "a" / "train-000000.tar") as tar:
        for info in tar:
            assert (info.mtime, info.uid, info.gid, info.uname, info.gname, info.mode) == (0, 0, 0, "", "", 0o644)


def test_a_set_is_cut_into_shards_of_each_split_in_the_order_of_its_samples(phantoms, triples, tmp_path):
    held_out = list(read_split(phantoms, "val"))
    mixed = [pair for a, b in zip(triples, held_out, strict=True) for pair in (("train", a), ("val", b))]
    manifest = write_set(tmp_path, "phantom", mixed, 4)
    assert [(shard.name, shard.num_samples) for shard in manifest.shards] == [
        ("train-000000.tar", 4),
        ("train-000001.tar", 2),
        ("val-000000.tar", 4),
        ("val-000001.tar", 2),
    ]
    assert [triple.key for triple in read_split(tmp_path, "train")] == [triple.key for triple in triples]
    verify_set(tmp_path)


def test_two_samples_with_one_key_are_refused(triples, tmp_path):
    with pytest.raises(ShardError, match=f"two samples have the key {triples[0].key}; give one of them another key"):
        write_shard(tmp_path, "train-000000.tar", "train", [triples[0], triples[0]])
    with pytest.raises(ShardError, match=f"two samples have the key {triples[0].key}"):
        write_set(tmp_path, "phantom", [("train", triples[0]), ("val", triples[0])], 4)
    with pytest.raises(ShardError, match=r"train-000000.tar: a shard has at least one sample"):
        write_shard(tmp_path, "train-000000.tar", "train", [])
    assert not list(tmp_path.glob("*.tar"))


def test_a_subject_in_two_splits_leaves_no_manifest(triples, tmp_path):
    assert triples[0].meta.subject == triples[1].meta.subject
    with pytest.raises(ShardError, match=f"subject {triples[0].meta.subject} is in two splits, train and val"):
        write_set(tmp_path, "phantom", [("train", triples[0]), ("val", triples[1])], 4)
    assert not (tmp_path / MANIFEST).exists()


def test_an_interrupted_run_starts_afresh_and_gives_the_bytes_of_an_uninterrupted_one(triples, tmp_path):
    samples = [("train", triple) for triple in triples]

    def interrupted():
        yield from samples[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_set(tmp_path / "a", "phantom", interrupted(), 1, {"seed": 0})
    (tmp_path / "a" / ".train-000005.tar.tmp-1-abcdef01").write_bytes(b"half")
    assert len(list((tmp_path / "a").glob("*.tar"))) == 5
    assert existing_set(tmp_path / "a", {"seed": 0}) is None
    for name in "ab":
        write_set(tmp_path / name, "phantom", samples, 4, {"seed": 0})
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert UNFINISHED not in files_of(tmp_path / "a")


def test_a_set_made_with_the_same_settings_is_left_alone_and_another_one_refused(triples, tmp_path):
    samples = [("train", triple) for triple in triples]
    about = {"settings": {"seed": 0, "size_px": 64}}
    written = write_set(tmp_path, "phantom", samples, 4, about)
    assert existing_set(tmp_path, about) == written
    with pytest.raises(ShardError) as error:
        existing_set(tmp_path, {"settings": {"seed": 1, "size_px": 64}})
    assert str(error.value) == (
        f"{tmp_path}: holds a set that was made with other settings.seed (0, now 1); "
        "choose another out, or remove the folder"
    )
    with pytest.raises(ShardError, match="holds a set already"):
        write_set(tmp_path, "phantom", samples, 4, about)
    (tmp_path / "train-000001.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"train-000001.tar: is not the shard that its manifest names; remove"):
        existing_set(tmp_path, about)
    assert read_manifest(tmp_path) == written


def test_tars_of_somebody_else_are_not_overwritten(triples, tmp_path):
    (tmp_path / "train-000000.tar").write_bytes(b"precious")
    for attempt in (
        lambda: existing_set(tmp_path, {}),
        lambda: write_set(tmp_path, "phantom", [("train", triples[0])], 4),
    ):
        with pytest.raises(ShardError, match=r"holds tars but no manifest.json; choose an empty folder"):
            attempt()
    assert files_of(tmp_path) == {"train-000000.tar": b"precious"}
