"""Releasing a set: only one that passed, as it was judged, clean in every byte, and with a card that names nobody."""

import json
import os
import shutil
import sys
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest

from ccmdist.cli import exit_code
from ccmdist.commit import commit_json
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.reader import read_split, verify_set
from ccmdist.errors import EXIT_REFUSED, RunError, ShardError
from ccmdist.jobs.release import CARD_JSON, CARD_TEXT, release

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from measure.planted import copies, drawn, judged, real_set, stranger, training_frames, write_synthetic

SIZE_PX = 128
ORIGIN = {"base_digest": "b" * 64, "adapter_digest": "a" * 64, "denoise_steps": 8, "note": "Mrs Private of Room 7"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A real set, one independent synthetic set, one with a copy, and the report on both."""
    root = tmp_path_factory.mktemp("release")
    manifest = real_set(root / "real", 20, SIZE_PX, 0)
    strangers = [drawn(one, f"{one.key}-0000") for one in (stranger(5, number, SIZE_PX) for number in range(24))]
    clean = write_synthetic(root / "clean", strangers, manifest)
    commit_manifest(root / "clean", "synthetic", clean.shards, clean.about | {"note": "Mrs Private", "seed": 3})
    copy = copies(training_frames(root / "real")[:1], "verbatim", 6, SIZE_PX)
    write_synthetic(root / "copied", [*copy.values(), *strangers], manifest)
    sets = {name: root / name for name in ("clean", "copied")}
    verdicts = {name: judged(root / "real", folder, root / "report") for name, folder in sets.items()}
    # What of a report.json is read; tests/distributed/test_distributed_identifiers.py takes a whole one.
    values = {name: {"gate": asdict(verdict), "origins": [ORIGIN]} for name, verdict in verdicts.items()}
    settings = {"synthetic": {name: str(folder) for name, folder in sets.items()}}
    commit_json(root / "report" / "report.json", {"synthetic": values, "settings": settings})
    return root


def test_a_set_that_passed_is_written_with_its_card(world, tmp_path, capsys):
    out = tmp_path / "released"
    release(world / "clean", world / "report", out, "CC-BY-NC-4.0")
    assert "released 24 images" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [CARD_TEXT, CARD_JSON, "manifest.json", "test-000000.tar"]
    assert verify_set(out).manifest.num_samples == 24
    assert read_manifest(out).digest == read_manifest(world / "clean").digest
    card = json.loads((out / CARD_JSON).read_text())
    assert card["num_images"] == 24
    assert card["gate"]["passed"]
    assert card["gate"]["num_copies"] == 0
    assert card["licence"] == "CC-BY-NC-4.0"
    assert card["made_by"]["seed"] == 3
    assert card["made_by"]["training"]["num_subjects"] == len(_training_subjects(world))
    text = (out / CARD_TEXT).read_text()
    assert "phantom" not in text.partition("## Known limits")[0]
    for heading in ("## Origin", "## The gate", "## Intended use", "## Not for", "## Known limits", "## Licence"):
        assert heading in text


def _training_subjects(world):
    return {subject for shard in read_manifest(world / "real").of_split("train") for subject in shard.subjects}


def test_what_is_released_holds_no_path_no_host_and_nobody_of_the_training_set(world, tmp_path):
    release(world / "clean", world / "report", tmp_path / "released")
    texts = [path.read_text() for path in (tmp_path / "released").iterdir() if path.suffix != ".tar"]
    texts += [_tar_text(tmp_path / "released" / "test-000000.tar")]
    subjects = _training_subjects(world)
    assert any(subject in (world / "clean" / "manifest.json").read_text() for subject in subjects)
    for text in texts:
        assert not any(subject in text for subject in subjects)
        assert str(world) not in text
        assert os.uname().nodename not in text
        assert "Mrs Private" not in text
    assert "to-be-chosen" in texts[0] + texts[1] + texts[2]


def _tar_text(path):
    with tarfile.open(path) as tar:
        return "".join(tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".json"))


def test_the_same_command_again_changes_nothing_and_another_set_is_not_overwritten(world, tmp_path):
    out = tmp_path / "released"
    release(world / "clean", world / "report", out)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    release(world / "clean", world / "report", out)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    with pytest.raises(RunError, match="released: holds something else; choose another folder; nothing is overwritten"):
        release(world / "clean", world / "report", out, "MIT")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="mine: holds something else"):
        release(world / "clean", world / "report", tmp_path / "mine")


def command(folder, report, out):
    return ["release", str(folder), "--report", str(report), "--out", str(out)]


def test_a_dry_run_tells_and_writes_nothing(world, tmp_path, capsys):
    arguments = command(world / "clean", world / "report", tmp_path / "released")
    assert exit_code([*arguments, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "would hold 24 images" in told
    assert "dry run: nothing was done" in told
    assert not list(tmp_path.iterdir())


def test_a_set_with_a_copy_is_refused_with_the_reasons_and_exit_code_78(world, tmp_path, capsys):
    arguments = command(world / "copied", world / "report", tmp_path / "released")
    assert exit_code(arguments) == EXIT_REFUSED
    told = capsys.readouterr().err
    assert "copied: is withheld by the gate and not released:\n  1 image is a copy of training frames, NCC " in told
    assert "copy-0000" in told
    assert not list(tmp_path.iterdir())


def test_a_set_that_was_changed_since_or_never_judged_is_refused(world, tmp_path):
    shutil.copytree(world / "clean", tmp_path / "clean")
    release(tmp_path / "clean", world / "report", tmp_path / "moved")
    triples = list(read_split(world / "clean", "test"))[:20]
    shutil.rmtree(tmp_path / "clean")
    write_synthetic(tmp_path / "clean", triples, read_manifest(world / "real"))
    with pytest.raises(RunError, match="clean: this report does not judge it; judge it with `ccmdist evaluate`"):
        release(tmp_path / "clean", world / "report", tmp_path / "out")
    report = json.loads((world / "report" / "report.json").read_text())
    report["settings"]["synthetic"]["clean"] = str(tmp_path / "clean")
    commit_json(tmp_path / "report.json", report)
    with pytest.raises(RunError, match="clean: was changed since this report judged it"):
        release(tmp_path / "clean", tmp_path / "report.json", tmp_path / "out")
    report["synthetic"]["clean"]["gate"] = None
    commit_json(tmp_path / "report.json", report)
    with pytest.raises(RunError, match=r"clean: this report was made without a gate \(memorisation: null\)"):
        release(tmp_path / "clean", tmp_path / "report.json", tmp_path / "out")
    for content, message in (("{}", "is not the report of an evaluation"), (None, "No such file")):
        path = tmp_path / "other.json"
        path.write_text(content) if content else path.unlink()
        with pytest.raises(RunError, match=message):
            release(tmp_path / "clean", path, tmp_path / "out")


def test_a_control_is_refused_and_a_set_of_phantoms_says_so_on_its_card(world, tmp_path):
    report = json.loads((world / "report" / "report.json").read_text()) | {"real": {"kind": "phantom"}}
    commit_json(tmp_path / "report.json", report)
    release(world / "clean", tmp_path / "report.json", tmp_path / "out")
    text = (tmp_path / "out" / CARD_TEXT).read_text()
    assert "pretty_name: Synthetic corneal confocal microscopy, from phantoms" in text
    assert "**Made from phantoms.**" in text
    report["synthetic"]["clean"]["control"] = {"prompts": "next_group", "of": None, "prompt_effect": {}}
    commit_json(tmp_path / "report.json", report)
    with pytest.raises(RunError, match=r"clean: is a control, drawn with .* groups than its samples; release the set"):
        release(world / "clean", tmp_path / "report.json", tmp_path / "other")


def test_a_set_whose_masks_are_not_those_of_its_images_is_refused(world, tmp_path):
    shutil.copytree(world / "clean", tmp_path / "clean")
    manifest = read_manifest(tmp_path / "clean")
    commit_manifest(tmp_path / "clean", "synthetic", manifest.shards, manifest.about | {"sees_mask": False})
    with pytest.raises(
        RunError, match=r"clean: was drawn from prompts alone, so its masks do not show .*mask_condition"
    ):
        release(tmp_path / "clean", world / "report", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_shard_that_was_changed_behind_its_manifest_is_refused(world, tmp_path):
    shutil.copytree(world / "clean", tmp_path / "clean")
    tar = tmp_path / "clean" / "test-000000.tar"
    data = bytearray(tar.read_bytes())
    data[-1] = 7
    tar.write_bytes(data)
    with pytest.raises(ShardError, match=r"test-000000\.tar"):
        release(tmp_path / "clean", world / "report", tmp_path / "out")


def test_real_frames_and_licences_that_are_none_are_refused(world, tmp_path):
    with pytest.raises(RunError, match="real: is a phantom set, expected one drawn by a model; real frames are never"):
        release(world / "real", world / "report", tmp_path / "out")
    with pytest.raises(RunError, match=r"licence: 'a\\nb: c' is no name of a licence; write it like CC-BY-NC-4.0"):
        release(world / "clean", world / "report", tmp_path / "out", "a\nb: c")


def test_stock_loaders_read_what_was_released(world, tmp_path, monkeypatch):
    import webdataset

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    from datasets import load_dataset

    out = tmp_path / "released"
    release(world / "clean", world / "report", out, "CC-BY-4.0")
    keys = [triple.key for triple in read_split(world / "clean", "test")]
    assert [s["__key__"] for s in webdataset.WebDataset(str(out / "test-000000.tar"), shardshuffle=False)] == keys
    # The folder as a hub would hold it: the card's header says which files are data.
    rows = load_dataset(str(out), split="test", cache_dir=str(tmp_path / "hf"))
    assert rows["__key__"] == keys
    assert rows[0]["image.png"].size == (SIZE_PX, SIZE_PX)
    assert rows[0]["json"]["source"] == "synthetic"
