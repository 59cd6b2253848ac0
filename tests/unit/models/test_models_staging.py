"""A model on the node's own disk, and one that was converted, are the model; half of either is none."""

import inspect
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ccmdist import cli
from ccmdist.cli import exit_code
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import MonitorSettings
from ccmdist.errors import ModelError
from ccmdist.models import convert as convert_module
from ccmdist.models import mmdit, staging, tabulation
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.node_folder import node_folder
from ccmdist.models.staging import staged
from ccmdist.models.tabulation import table_for

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_copy):
    return ModelFolder.open(tiny_copy)


def weights(folder):
    return mmdit.build(folder, torch.bfloat16, None).state_dict()


def test_a_staged_model_is_the_same_and_its_transformer_lies_on_the_node(node, folder):
    copy = staged(folder, folder.transformer_digest())
    assert (copy.path / "transformer").resolve().parents[1] == node
    assert ModelFolder.open(copy.path).transformer_digest() == folder.transformer_digest()
    assert copy.encoder_identity() == folder.encoder_identity()
    expected, found = weights(folder), weights(copy)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    LatentCodec.load(copy, torch.float32, CPU)


def test_it_is_copied_once_and_again_only_when_a_file_is_cut_short(node, folder, monkeypatch):
    copies, original = [], shutil.copyfile
    monkeypatch.setattr(staging.shutil, "copyfile", lambda *a: copies.append(a) or original(*a))
    digest = folder.transformer_digest()
    num_files = len(list((folder.path / "transformer").iterdir()))
    copy = staged(folder, digest)
    staged(folder, digest)
    assert len(copies) == num_files
    os.truncate(next((copy.path / "transformer").glob("*.safetensors")), 100)
    assert staged(folder, digest).transformer_digest() == digest
    assert len(copies) == 2 * num_files


def test_models_that_share_a_transformer_keep_all_else_apart(node, folder, tmp_path):
    other = ModelFolder.open(shutil.copytree(folder.path, tmp_path / "other"))
    schedule = other.path / "scheduler/scheduler_config.json"
    schedule.write_text(json.dumps(folder.noise_schedule() | {"shift_terminal": 0.5}))
    digest = folder.transformer_digest()
    assert staged(folder, digest).noise_schedule() == folder.noise_schedule()
    copy = staged(other, digest)
    assert copy.noise_schedule()["shift_terminal"] == 0.5
    (other.path / "modulation").mkdir()  # such as a table that comes later
    assert (staged(other, digest).path / "modulation").is_dir()
    assert len(list(node.glob("model-*"))) == 1


def test_a_model_that_is_gone_hinders_no_other(node, folder, tmp_path):
    gone = ModelFolder.open(shutil.copytree(folder.path, tmp_path / "gone"))
    config = gone.path / "transformer/config.json"
    config.write_text(json.dumps(gone.config("transformer") | {"_name_or_path": "other"}))
    staged(gone, gone.transformer_digest())
    moved = ModelFolder.open(gone.path.rename(tmp_path / "moved"))
    staged(folder, folder.transformer_digest())
    assert ModelFolder.open(staged(moved, moved.transformer_digest()).path).noise_schedule() == moved.noise_schedule()


def test_a_node_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CCMDIST_NODE_TMP", str(tmp_path / "file"))
    with pytest.raises(
        ModelError, match=r"cannot be made \(Not a directory\); set CCMDIST_NODE_TMP to a folder on this"
    ):
        node_folder()


def test_a_copy_that_differs_is_refused_and_removed(node, folder):
    with pytest.raises(
        ModelError, match=r"model-wrong: the copy is [0-9a-f]{12}, expected wrong as in .*/model; see that"
    ):
        staged(folder, "wrong")
    assert [path.name for path in node.iterdir()] == ["model.lock"]


def test_a_node_without_room_for_the_model_is_refused_before_anything_is_copied(node, folder, monkeypatch):
    usage = shutil.disk_usage(node)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(ModelError, match=r"for a copy of the transformer; .* or set data\.stage_model=false$"):
        staged(folder, folder.transformer_digest())
    assert [path.name for path in node.iterdir()] == ["model.lock"]


def convert(model, out, *options):
    return exit_code(["model", "convert", str(model), "--out", str(out), "--image-size-px", "64", *options])


def test_a_converted_model_is_the_same_with_a_table_that_runs_find(node, folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "converted"
    assert convert(folder.path, out, "--denoise-steps", "2") == 0
    converted = ModelFolder.open(out)
    assert converted.transformer_digest() == folder.transformer_digest()
    assert converted.encoder_identity() == folder.encoder_identity()
    weight_file = next((folder.path / "transformer").glob("*.safetensors"))
    assert (out / "transformer" / weight_file.name).samefile(weight_file)
    monkeypatch.setattr(tabulation, "tabulate", None)  # nothing is left to be made
    digest = folder.transformer_digest()
    table = table_for(converted, torch.tensor([1.0]), torch.bfloat16, 3, CPU, digest)
    assert Path(table.about).parent == out / "modulation"
    mmdit.build(converted, torch.bfloat16, None, table=table)
    assert convert(folder.path, out) == 78
    assert f"{out}: already holds a model; choose another folder" in capsys.readouterr().err


def test_an_interrupted_conversion_is_no_model_and_is_ended_by_the_same_command(folder, tmp_path, monkeypatch):
    out, original = tmp_path / "converted", convert_module.write_table

    def interrupted(place, *_):
        place.mkdir(parents=True)
        (place / ".modulation-0123.safetensors.tmp-1-2").write_bytes(b"x")
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_module, "write_table", interrupted)
    assert convert(folder.path, out) == 75
    with pytest.raises(ModelError, match=r"model_index\.json is missing"):
        ModelFolder.open(out)
    monkeypatch.setattr(convert_module, "write_table", original)
    assert convert(folder.path, out) == 0
    assert [path.suffix for path in (out / "modulation").iterdir()] == [".safetensors"]


def test_on_a_full_disk_a_conversion_is_refused(folder, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert convert(folder.path, tmp_path / "converted") == 78
    assert (
        "No space left on device; see that the path exists, can be written and has space left"
        in capsys.readouterr().err
    )
    assert not list((tmp_path / "converted" / "modulation").iterdir())


def test_across_file_systems_files_are_linked_by_name(folder, tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    assert convert(folder.path, tmp_path / "converted") == 0
    assert (tmp_path / "converted/vae/config.json").is_symlink()
    assert ModelFolder.open(tmp_path / "converted").transformer_digest() == folder.transformer_digest()


def test_a_component_that_is_a_link_to_a_folder_elsewhere_is_converted_too(tiny_copy, tmp_path):
    (tiny_copy / "vae").rename(tmp_path / "vae")
    (tiny_copy / "vae").symlink_to(tmp_path / "vae")
    assert convert(tiny_copy, tmp_path / "converted") == 0
    assert (tmp_path / "converted/vae/config.json").samefile(tmp_path / "vae/config.json")


def test_by_default_those_levels_are_tabulated_that_runs_use_by_default():
    fields = {"out": "out", "data": {"shards": "shards", "model": "model"}}
    drawn = SynthesizeConfig.model_validate(fields).denoise_steps
    assert inspect.signature(cli.convert).parameters["denoise_steps"].default == [
        drawn,
        MonitorSettings().denoise_steps,
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--image-size-px", "100"),
            "--image-size-px: 100 is not a multiple of 16 from 32 to 2048; use data.image_size_px",
        ),
        (("--dtype", "fp16"), "--dtype: 'fp16' is not known; use bf16 or fp32"),
        (("--denoise-steps", "1"), "denoise_steps: 1 is too few; use at least 2"),
    ],
)
def test_what_no_run_could_use_is_not_tabulated(folder, tmp_path, options, told, capsys):
    assert convert(folder.path, tmp_path / "converted", *options) == 78
    assert told in capsys.readouterr().err
    assert not (tmp_path / "converted").exists()


def test_a_model_is_not_converted_into_itself(folder, capsys):
    assert convert(folder.path, folder.path / "converted") == 78
    assert "lies in the model that is converted; choose a folder beside it" in capsys.readouterr().err
