"""A model folder is complete or refused, with the way to get it; what it is follows from its own files."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from ccmdist.errors import ModelError
from ccmdist.models import model_folder
from ccmdist.models.model_folder import ModelFolder, content_digest

WEIGHTS = "transformer/diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def remedy(folder, repository="Qwen/Qwen-Image-Edit-2509"):
    return (
        f"; on a machine with internet run `hf download {repository} --local-dir {folder.name}` and copy it to "
        f"{folder}, or make a small one: `ccmdist model make --size tiny --fitted --out {folder}`"
    )


def refusal(folder):
    with pytest.raises(ModelError) as problem:
        ModelFolder.open(folder)
    return str(problem.value)


def change(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
def test_the_version_is_read_off_the_checkpoint(tiny_models, version):
    folder = ModelFolder.open(tiny_models[version])
    assert folder.version == version
    assert folder.config("transformer")["zero_cond_t"] == (version == "2511")
    assert folder.noise_schedule()["max_shift"] == 0.9


def test_weights_are_found_over_all_files_and_in_one(tiny_models):
    folder = ModelFolder.open(tiny_models["2509"])
    assert len(set(folder.weight_files("transformer").values())) == 3
    assert {file.name for file in folder.weight_files("text_encoder").values()} == {"model.safetensors"}


def test_a_folder_that_is_not_there_is_told_how_to_get(tmp_path):
    folder = tmp_path / "models" / "edit"
    assert refusal(folder) == f"{folder}: there is no such folder{remedy(folder)}"


@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        WEIGHTS,
    ],
)
def test_a_missing_file_is_named_with_the_way_to_get_it(tiny_copy, file):
    (tiny_copy / file).unlink()
    assert refusal(tiny_copy) == f"{tiny_copy}: {file} is missing{remedy(tiny_copy)}"


def test_a_processor_is_asked_for_by_the_name_that_downloads_use(tiny_copy):
    file = tiny_copy / "processor/processor_config.json"
    file.rename(file.with_name("preprocessor_config.json"))
    ModelFolder.open(tiny_copy)
    file.with_name("preprocessor_config.json").unlink()
    assert refusal(tiny_copy).startswith(f"{tiny_copy}: processor/preprocessor_config.json is missing; on a machine ")


def test_a_tokenizer_of_vocabulary_and_merges_serves_as_well(tiny_copy):
    (tiny_copy / "tokenizer/tokenizer.json").unlink()
    (tiny_copy / "tokenizer/vocab.json").write_text("{}")
    assert "tokenizer/tokenizer.json is missing" in refusal(tiny_copy)
    (tiny_copy / "tokenizer/merges.txt").write_text("")
    ModelFolder.open(tiny_copy)


def test_the_way_to_get_a_file_names_the_version_that_is_there(tiny_models, tmp_path):
    for version, repository in (("v1", "Qwen/Qwen-Image-Edit"), ("2511", "Qwen/Qwen-Image-Edit-2511")):
        folder = shutil.copytree(tiny_models[version], tmp_path / version)
        (folder / "vae/config.json").unlink()
        assert refusal(folder) == f"{folder}: vae/config.json is missing{remedy(folder, repository)}"


def test_a_download_that_stopped_halfway_is_told_by_its_bytes(tiny_copy):
    file = tiny_copy / WEIGHTS
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1000])
    expected = f"{file}: the download is not complete ({size - 1000} of {size} bytes){remedy(tiny_copy)}"
    assert refusal(tiny_copy) == expected


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\x00",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 10\n",
        (1000).to_bytes(8, "little") + b'{"a": ',
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
    ],
    ids=["empty", "cut in its length", "a git-lfs pointer", "cut in its header", "no object", "no tensors"],
)
def test_a_file_that_is_no_safetensors_file_is_named(tiny_copy, content):
    (tiny_copy / WEIGHTS).write_bytes(content)
    assert refusal(tiny_copy) == f"{tiny_copy / WEIGHTS}: is not a complete safetensors file{remedy(tiny_copy)}"


def test_an_index_that_names_a_missing_file_is_told(tiny_copy):
    places = json.loads((tiny_copy / INDEX).read_text())["weight_map"]
    places["proj_out.weight"] = "diffusion_pytorch_model-00009-of-00009.safetensors"
    change(tiny_copy / INDEX, weight_map=places)
    missing = "transformer/diffusion_pytorch_model-00009-of-00009.safetensors"
    assert refusal(tiny_copy) == f"{tiny_copy}: {missing} is missing{remedy(tiny_copy)}"


def test_an_index_that_disagrees_with_the_files_is_told(tiny_copy):
    places = json.loads((tiny_copy / INDEX).read_text())["weight_map"]
    change(tiny_copy / INDEX, weight_map=places | {"img_in.extra": WEIGHTS.split("/")[1]})
    assert refusal(tiny_copy).startswith(f"{tiny_copy / WEIGHTS}: does not hold img_in.extra, as the index says; ")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}])
def test_an_index_without_a_map_is_told(tiny_copy, weight_map):
    change(tiny_copy / INDEX, weight_map=weight_map)
    expected = f"{tiny_copy / INDEX}: its weight_map does not say which file holds which tensor{remedy(tiny_copy)}"
    assert refusal(tiny_copy) == expected


def test_another_pipeline_is_refused_by_name(tiny_copy):
    change(tiny_copy / "model_index.json", _class_name="StableDiffusion3Pipeline")
    expected = "model_index.json: StableDiffusion3Pipeline is none of the known pipelines, QwenImageEditPipeline, "
    assert refusal(tiny_copy).startswith(f"{tiny_copy}/{expected}")
    assert refusal(tiny_copy).endswith(remedy(tiny_copy))


@pytest.mark.parametrize(("text", "problem"), [("{", "cannot be read (Expecting"), ("[1]", "holds no JSON object; ")])
def test_json_that_cannot_be_read_is_told(tiny_copy, text, problem):
    (tiny_copy / "vae/config.json").write_text(text)
    assert refusal(tiny_copy).startswith(f"{tiny_copy / 'vae/config.json'}: {problem}")


def test_the_way_to_get_a_model_is_a_command_that_exists(tmp_path):
    from ccmdist.cli import exit_code

    folder = tmp_path / "models" / "edit"
    command = re.search(r"`ccmdist (model make [^`]*)`", refusal(folder))[1].replace(" --fitted", "")
    assert exit_code(command.split()) == 0
    assert ModelFolder.open(folder).version == "2509"


def test_a_change_of_any_byte_changes_the_identity_of_a_weight_file(tmp_path):
    file = tmp_path / "weights"
    content = bytearray(range(256)) * 64
    file.write_bytes(content)
    before = content_digest(file)
    content[9999] ^= 1
    file.write_bytes(content)
    assert content_digest(file) != before


def test_a_large_file_is_known_by_samples_over_its_whole_length(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder, "MAX_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(model_folder, "SAMPLE_BYTES", 16)
    file, content = tmp_path / "weights", bytearray(10_000)
    file.write_bytes(content)
    before = content_digest(file)

    def digest_when_changed(*places):
        changed = bytearray(content)
        for place in places:
            changed[place] ^= 1
        file.write_bytes(changed)
        return content_digest(file)

    assert digest_when_changed(3) != before, "the header is in the first sample"
    assert digest_when_changed(9_999) != before, "the last sample ends with the file"
    assert digest_when_changed(*range(0, 10_000, 16)) != before, "what a training step changes, everywhere"
    assert digest_when_changed(20) == before, "between samples: the documented limit"
    file.write_bytes(content + b"\0")
    assert content_digest(file) != before


def identity(folder):
    return ModelFolder.open(folder).encoder_identity()


def changed_fields(before, after):
    return {name for name in before if before[name] != after[name]}


def test_the_identity_of_the_encoders_is_that_of_all_that_decides_an_embedding(tiny_models, tiny_copy):
    before = identity(tiny_copy)
    assert before == identity(tiny_models["2509"]), "the place does not matter"
    change(tiny_copy / "processor/processor_config.json", extra=1)
    assert changed_fields(before, identity(tiny_copy)) == {"processor"}
    change(tiny_copy / "tokenizer/tokenizer.json", extra=1)
    assert changed_fields(before, identity(tiny_copy)) == {"processor", "tokenizer"}
    change(tiny_copy / "vae/config.json", extra=1)
    assert changed_fields(before, identity(tiny_copy)) == {"processor", "tokenizer", "vae_config"}
    file = tiny_copy / "text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert "text_encoder_weights" in changed_fields(before, identity(tiny_copy))
    assert changed_fields(before, identity(tiny_models["2511"])) == {"version"}
    assert {"version", "template", "condition_edge_px"} == changed_fields(before, identity(tiny_models["v1"]))


def test_what_a_killed_download_or_make_left_behind_changes_no_identity(tiny_copy):
    before = identity(tiny_copy)
    (tiny_copy / "tokenizer/.tokenizer.json.tmp-12-0a1b2c3d").write_text("half")
    (tiny_copy / "tokenizer/.cache").mkdir()
    (tiny_copy / "README.md").write_text("text")
    assert identity(tiny_copy) == before


def test_the_transformer_and_the_encoders_are_told_apart(tiny_copy):
    folder = ModelFolder.open(tiny_copy)
    encoders, transformer = folder.encoder_identity(), folder.transformer_digest()
    file = tiny_copy / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert folder.encoder_identity() == encoders
    assert folder.transformer_digest() != transformer


def test_looking_at_a_model_folder_needs_no_torch(tiny_models):
    program = "import sys; from pathlib import Path; from ccmdist.models.model_folder import ModelFolder\n"
    program += "ModelFolder.open(Path(sys.argv[1])).encoder_identity(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program, str(tiny_models["v1"])], check=True)
