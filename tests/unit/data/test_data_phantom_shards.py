"""Sets of phantoms: reproducible, split by subject, and what the committed demo set was made with."""

import logging
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.cli import exit_code
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.manifest import SPLITS, read_manifest
from ccmdist.data.phantom_shards import sample, write_phantom_set
from ccmdist.data.reader import read_split, verify_set
from ccmdist.errors import ConfigError, ShardError

DEMO = Path(__file__).parents[3] / "shards" / "demo"
DEMO_VERSIONS = {"numpy": "2.4.6", "scipy": "1.17.1", "pillow": "13.0.0"}


def settings(out, **changes):
    small = {"subjects_per_group": 2, "frames_per_subject": 2, "size_px": 64, "val_fraction": 0.3, "test_fraction": 0.3}
    return PhantomShardsConfig(out=out, **small | changes)


def tars(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tmp_path):
    made = [write_phantom_set(settings(tmp_path / name, seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert tars(tmp_path / "a") == tars(tmp_path / "b")
    assert made[0].digest == made[1].digest != made[2].digest


def test_every_sample_says_what_it_is(phantoms):
    samples = {split: list(read_split(phantoms, split)) for split in SPLITS}
    assert len({triple.image.tobytes() for of_split in samples.values() for triple in of_split}) == 18
    for triples in samples.values():
        assert {triple.meta.clinical_group for triple in triples} == set(CLINICAL_GROUPS)
        for triple in triples:
            about = triple.meta
            assert triple.image.shape == triple.nerve_mask.shape == (64, 64)
            assert triple.key.startswith(f"{about.subject}-")
            assert about.subject.startswith(f"{about.clinical_group.lower()}-")
            assert (about.source, about.fields, about.provenance) == ("phantom", {}, None)
            assert about.um_per_px == pytest.approx(400 / 384)
            assert set(about.labels) == {"cnfd", "cnbd", "cnfl", "cnfa"}
    assert {triple.meta.eye for triple in samples["train"]} == {"OD", "OS"}


def test_the_frames_of_a_subject_share_its_split(phantoms):
    subjects = {split: {triple.meta.subject for triple in read_split(phantoms, split)} for split in SPLITS}
    assert [len(found) for found in subjects.values()] == [3, 3, 3]
    assert len(set.union(*subjects.values())) == 9


def test_a_sample_does_not_depend_on_the_size_of_its_set():
    small, again = sample(5, "T1DPN", 3, 1, 64), sample(5, "T1DPN", 3, 1, 64)
    np.testing.assert_array_equal(small.image, again.image)
    assert small.key == "t1dpn-0003-01"
    assert not np.array_equal(small.image, sample(5, "T1DPN", 3, 0, 64).image)
    assert not np.array_equal(small.image, sample(6, "T1DPN", 3, 1, 64).image)


def test_masks_are_the_exact_ones_of_the_phantoms(phantoms):
    triple = next(read_split(phantoms, "train"))
    assert triple.meta.labels["cnfa"] == pytest.approx(triple.nerve_mask.mean())


def test_a_set_that_is_there_is_left_alone_and_another_one_refused(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("ccmdist"), "propagate", True)
    written = write_phantom_set(settings(tmp_path / "a"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    with caplog.at_level(logging.INFO, "ccmdist"):
        assert write_phantom_set(settings(tmp_path / "a")) == written
    assert f"{tmp_path / 'a'}: already there, 12 samples in 3 shards" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    with pytest.raises(ShardError, match=r"made with other settings.size_px \(64, now 96\)"):
        write_phantom_set(settings(tmp_path / "a", size_px=96))


def test_fractions_that_leave_nothing_for_train_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="leave nothing for train"):
        write_phantom_set(settings(tmp_path / "a", val_fraction=0.5, test_fraction=0.5))
    assert not (tmp_path / "a").exists()


def test_the_command_makes_a_set_and_a_dry_run_only_says_what_it_would_hold(tmp_path, capsys):
    words = ["shards", "phantom", f"out={tmp_path / 'a'}", "subjects_per_group=2", "frames_per_subject=1", "size_px=64"]
    assert exit_code([*words, "--dry-run"]) == 0
    assert f"{tmp_path / 'a'}: 6 phantoms of 64 px; train 4 of 4 subjects, val 1 of 1" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
    assert exit_code(words) == 0
    assert verify_set(tmp_path / "a").manifest.num_samples == 6


@pytest.fixture(scope="module")
def demo_again(tmp_path_factory):
    """The committed demo set, made anew with the settings in its manifest."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    write_phantom_set(PhantomShardsConfig(out=out, **read_manifest(DEMO).about["settings"]))
    return out


def test_the_committed_demo_set_verifies_and_is_small():
    assert verify_set(DEMO).manifest.num_samples == 18
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 500_000


def test_the_demo_set_made_anew_holds_the_same_samples(demo_again):
    # Masks are exact; a grey value may round the other way where numpy was built for another processor.
    for split in SPLITS:
        for ours, theirs in zip(read_split(DEMO, split), read_split(demo_again, split), strict=True):
            assert ours.key == theirs.key
            np.testing.assert_array_equal(ours.nerve_mask, theirs.nerve_mask)
            assert np.abs(ours.image.astype(int) - theirs.image).max() <= 1
            assert ours.meta.labels == pytest.approx(theirs.meta.labels, rel=1e-9)


def test_the_demo_set_made_anew_has_the_same_bytes(demo_again):
    if any(version(name) != expected for name, expected in DEMO_VERSIONS.items()):
        pytest.skip(f"made with {DEMO_VERSIONS}; other versions may draw or compress otherwise")
    assert tars(demo_again) == tars(DEMO)
