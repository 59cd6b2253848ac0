"""What a manifest promises, and that a changed or contradictory one is not believed."""

import json
from dataclasses import replace

import pytest

from ccmdist.data.manifest import MANIFEST, ShardEntry, commit_manifest, read_manifest
from ccmdist.errors import ShardError

SHA = "0" * 64


def entry(name="train-000000.tar", split="train", subjects=("a", "b"), group_counts=None, num_samples=3):
    return ShardEntry(name, split, num_samples, 10240, SHA, subjects, group_counts or {"Control": 2, "unlabelled": 1})


def test_a_manifest_comes_back_as_it_was_committed(tmp_path):
    entries = [entry("val-000000.tar", "val", ("c",)), entry("train-000001.tar"), entry()]
    written = commit_manifest(tmp_path, "real", entries, {"settings": {"seed": 3}})
    found = read_manifest(tmp_path)
    assert found == written
    assert found.digest == written.digest
    assert [shard.name for shard in found.shards] == ["train-000000.tar", "train-000001.tar", "val-000000.tar"]
    assert found.of_split("train") == (entries[2], entries[1])
    assert found.of_split("test") == ()
    assert (found.kind, found.num_samples, found.about) == ("real", 9, {"settings": {"seed": 3}})


def test_the_digest_is_of_the_contents_alone(tmp_path):
    def digest(kind="real", about=None, entries=None):
        return commit_manifest(tmp_path, kind, entries or [entry()], about or {}).digest

    assert digest() == digest(about={"made": "later"})
    assert digest() != digest("synthetic")
    assert digest() != digest(entries=[replace(entry(), sha256="1" * 64)])


def changed(folder, **changes):
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({k: v for k, v in (values | changes).items() if v is not ...}))


def shard(**changes):
    fields = ("name", "split", "num_samples", "num_bytes", "sha256", "subjects", "group_counts")
    return {name: getattr(entry(), name) for name in fields} | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, expected 1; use the ccmdist that made the set"),
        ({"format_version": ...}, "is not the manifest of a shard set, format_version is missing"),
        ({"kind": "phantom"}, "was changed after it was written, its digest does not fit; copy or make the set anew"),
        ({"digest": ...}, "was changed after it was written"),
        ({"kind": "fake"}, "kind: Input should be 'real', 'phantom' or 'synthetic'"),
        ({"shards": []}, "it names no shards"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"shards": [shard(name="../train-000000.tar")]}, "shards.0: '../train-000000.tar' is not the name of a train"),
        ({"shards": [shard(split="val")]}, "shards.0: 'train-000000.tar' is not the name of a val shard"),
        ({"shards": [shard(num_samples=4)]}, "shards.0: train-000000.tar: 4 samples, but 3 in its groups"),
        ({"shards": [shard(num_samples=0)]}, "shards.0.num_samples: Input should be greater than or equal to 1"),
        ({"shards": [shard(group_counts={"T1DNP": 3})]}, "shards.0: train-000000.tar: unknown clinical group 'T1DNP'"),
        ({"shards": [shard(sha256="x")]}, "shards.0.sha256: String should match pattern"),
        ({"shards": [shard(), shard()]}, "it names train-000000.tar twice"),
        (
            {"shards": [shard(), shard(name="val-000000.tar", split="val", subjects=["b"])]},
            "subject b is in two splits, train and val (val-000000.tar); make the set again",
        ),
    ],
)
def test_a_manifest_that_was_changed_or_contradicts_itself_is_refused(tmp_path, changes, message):
    commit_manifest(tmp_path, "real", [entry()])
    changed(tmp_path, **changes)
    with pytest.raises(ShardError) as error:
        read_manifest(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / MANIFEST}: {message}")


def test_a_subject_in_two_splits_is_not_committed(tmp_path):
    with pytest.raises(ShardError, match="subject a is in two splits, train and test"):
        commit_manifest(tmp_path, "real", [entry(), entry("test-000000.tar", "test", ("a",))])
    with pytest.raises(ShardError, match="it names no shards"):
        commit_manifest(tmp_path, "real", [])
    assert not (tmp_path / MANIFEST).exists()


def test_a_folder_without_a_manifest_says_how_to_make_one(tmp_path):
    with pytest.raises(
        ShardError, match=r"manifest.json: No such file or directory; name the folder of a complete set; `ccm"
    ):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ShardError, match="is not JSON"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(ShardError, match="is not the manifest of a shard set"):
        read_manifest(tmp_path)
