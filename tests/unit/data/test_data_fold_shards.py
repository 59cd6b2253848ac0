"""Folds of a set: every subject is tested once, the groups stay even, and the samples are those of the source."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.data import FoldShardsConfig, PhantomShardsConfig
from ccmdist.config.loading import load
from ccmdist.data.fold_shards import describe_fold_set, write_fold_set
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_metas, read_split, verify_set
from ccmdist.data.splits import Subject, fold_splits, stratified_parts
from ccmdist.data.writer import write_set
from ccmdist.errors import ConfigError, ShardError

GROUPS = (*CLINICAL_GROUPS, None)
SUBJECTS = st.dictionaries(
    st.text("abcdef0123456789", min_size=1, max_size=6),
    st.builds(Subject, st.sampled_from(GROUPS), st.integers(1, 9)),
    min_size=1,
    max_size=40,
)


@given(SUBJECTS, st.integers(2, 6), st.integers(0, 3))
def test_parts_differ_in_frames_of_a_group_by_no_more_than_one_subject(subjects, num_parts, seed):
    parts = stratified_parts(subjects, num_parts, seed)
    assert parts.keys() == subjects.keys()
    assert parts == stratified_parts(dict(reversed(subjects.items())), num_parts, seed)
    for group in GROUPS:
        frames = [0] * num_parts
        largest = 0
        for name, part in parts.items():
            if subjects[name].clinical_group == group:
                frames[part] += subjects[name].num_frames
                largest = max(largest, subjects[name].num_frames)
        assert max(frames) - min(frames) <= largest


@given(SUBJECTS, st.integers(2, 6), st.integers(0, 3), st.data())
def test_over_the_folds_each_subject_is_tested_once_and_those_kept_for_training_never(subjects, num_folds, seed, data):
    kept = data.draw(st.sets(st.sampled_from(sorted(subjects))))
    tested = []
    for fold in range(num_folds):
        splits = fold_splits(subjects, fold, num_folds, seed, kept)
        assert splits.keys() == subjects.keys()
        assert all(splits[name] == "train" for name in kept)
        tested += [name for name, split in splits.items() if split == "test"]
    assert sorted(tested) == sorted(set(subjects) - kept)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "phantom"
    config = PhantomShardsConfig(out=folder, subjects_per_group=4, frames_per_subject=2, size_px=64)
    write_phantom_set(config.model_copy(update={"samples_per_shard": 7}))
    return folder


def fold_of(source, out, *more):
    return load(FoldShardsConfig, [], [f"source={source}", f"out={out}", "num_folds=2", *more])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_fold_holds_the_samples_of_its_source_split_anew(source, tmp_path):
    by_key = {t.key: t for split in ("train", "val", "test") for t in read_split(source, split)}
    tested = []
    for number in range(2):
        manifest = write_fold_set(fold_of(source, tmp_path / str(number), f"fold={number}"))
        assert verify_set(tmp_path / str(number)).manifest == manifest
        assert (manifest.kind, manifest.num_samples) == ("phantom", 24)
        assert manifest.about["source_set_digest"] == read_manifest(source).digest
        assert manifest.about["settings"]["fold"] == number
        assert str(source) not in str(manifest.about)
        found = {t.key: t for split in ("train", "val", "test") for t in read_split(tmp_path / str(number), split)}
        assert {key: (t.meta, t.image.tobytes()) for key, t in found.items()} == {
            key: (t.meta, t.image.tobytes()) for key, t in by_key.items()
        }
        tested += [subject for entry in manifest.of_split("test") for subject in entry.subjects]
    assert sorted(tested) == sorted({triple.meta.subject for triple in by_key.values()})


def test_a_fold_is_made_once_and_always_of_the_same_bytes(source, tmp_path):
    write_fold_set(fold_of(source, tmp_path / "a", "fold=1"))
    before = contents(tmp_path / "a")
    write_fold_set(fold_of(source, tmp_path / "a", "fold=1"))
    write_fold_set(fold_of(source, tmp_path / "b", "fold=1"))
    assert contents(tmp_path / "a") == before == contents(tmp_path / "b")
    with pytest.raises(ShardError, match=r"holds a set that was made with other settings.fold \(1, now 0\)"):
        write_fold_set(fold_of(source, tmp_path / "a", "fold=0"))


def test_what_a_fold_would_hold_is_told_before(source, tmp_path):
    told = describe_fold_set(fold_of(source, tmp_path / "a", "fold=0"))
    assert told == f"{tmp_path}/a: fold 0 of 2 of {source}; train 3 subjects, val 3 subjects, test 6 subjects"


def test_folds_of_a_synthetic_set_and_more_folds_than_subjects_are_refused(source, tmp_path):
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    commit_manifest(drawn, "synthetic", read_manifest(source).shards)
    with pytest.raises(ShardError, match=f"{drawn}: is a synthetic set, expected real frames or phantoms"):
        write_fold_set(fold_of(drawn, tmp_path / "a", "fold=0"))
    with pytest.raises(ShardError, match=r"has 12 subjects, fewer than the 13 folds; lower num_folds"):
        write_fold_set(fold_of(source, tmp_path / "a", "fold=0", "num_folds=13"))
    with pytest.raises(ConfigError, match="fold: 2 is not below num_folds 2; folds are counted from 0"):
        fold_of(source, tmp_path / "a", "fold=2")


def test_the_fields_of_a_shard_are_read_without_its_images(source):
    for entry in read_manifest(source).shards:
        triples = [(t.key, t.meta) for t in read_split(source, entry.split) if t.meta.subject in entry.subjects]
        assert set(read_metas(source, entry).__next__()[1].labels) == set(triples[0][1].labels)
        assert all(pair in triples for pair in read_metas(source, entry))


def test_a_frame_that_is_to_be_repaired_is_in_the_fold_that_tests_its_subject_and_in_no_other(source, tmp_path):
    hole = np.zeros((64, 64), bool)
    hole[:8] = True
    triples = list(read_split(source, "train"))
    damaged = replace(triples[0], inpaint_mask=hole)
    write_set(tmp_path / "real", "phantom", (("train", triple) for triple in [damaged, *triples[1:]]), 16, {})
    found = []
    for fold in range(3):
        config = FoldShardsConfig(source=tmp_path / "real", out=tmp_path / f"fold{fold}", fold=fold, num_folds=3)
        write_fold_set(config)
        of_split = {split: list(read_split(config.out, split)) for split in ("train", "val", "test")}
        found += [split for split, those in of_split.items() for triple in those if triple.key == damaged.key]
        assert all(triple.inpaint_mask is None for split in ("train", "val") for triple in of_split[split])
    assert found == ["test"]
