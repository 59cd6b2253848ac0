"""An adapter's folder: read as it was written, loaded by stock libraries, and refused when it is not whole."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ccmdist.adapters.state import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from ccmdist.errors import AdapterError

LINEAR = "transformer_blocks.0.attn.to_q"


@pytest.fixture
def written(moved, tmp_path):
    write_adapter(tmp_path, moved)
    return tmp_path


def stored(folder):
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118


def refusal(folder):
    with pytest.raises(AdapterError) as error:
        read_adapter(folder)
    assert WEIGHTS_FILE in str(error.value)
    assert error.value.remedy
    return error.value.message


def test_an_adapter_is_read_as_it_was_written(trained, tmp_path):
    write_adapter(tmp_path, trained)
    found = read_adapter(tmp_path)
    assert found.settings == trained.settings
    assert found.facts == trained.facts
    assert found.tensors.keys() == trained.tensors.keys()
    for name, tensors in trained.tensors.items():
        assert tensors.keys() == found.tensors[name].keys()
        assert all(torch.equal(tensors[kind], found.tensors[name][kind]) for kind in tensors)


def test_the_file_has_the_names_of_peft_and_the_alpha_of_the_settings(moved, written):
    tensors, metadata = stored(written)
    expected = {"lora_A.weight", "lora_B.weight"} | (
        {"lora_magnitude_vector"} if moved.settings.kind == "wdlora" else set()
    )
    assert {key.removeprefix(f"transformer.{LINEAR}.") for key in tensors if LINEAR in key} == expected
    peft = json.loads(metadata["lora_adapter_metadata"])
    assert peft["transformer.r"] == 4
    assert peft["transformer.lora_alpha"] == moved.settings.alpha
    assert peft["transformer.use_dora"] == (moved.settings.kind == "wdlora")


def test_peft_reads_the_config(moved, written):
    from peft import LoraConfig, PeftConfig

    config = PeftConfig.from_pretrained(str(written))
    assert isinstance(config, LoraConfig)
    assert (config.r, config.lora_alpha) == (4, moved.settings.alpha)
    assert config.use_dora == (moved.settings.kind == "wdlora")
    assert set(config.target_modules) == moved.tensors.keys()
    assert (written / CONFIG_FILE).is_file()


def test_the_card_names_base_data_steps_and_what_it_is_not_for(moved, tmp_path):
    write_adapter(tmp_path, moved)
    card = (tmp_path / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n"), "no published base is claimed"
    for text in ("Not for diagnosis", "d" * 64, "| step | 7 |", "license: other", f'weight_name="{WEIGHTS_FILE}"'):
        assert text in card
    published = replace(moved, facts={**moved.facts, "base_model": "Qwen/Qwen-Image-Edit-2509"})
    write_adapter(tmp_path, published)
    assert (tmp_path / CARD_FILE).read_text().startswith("---\nbase_model: Qwen/Qwen-Image-Edit-2509\n")


def test_blocks_are_read_in_their_order(moved, tmp_path):
    names = [f"transformer_blocks.{index}.attn.to_q" for index in (2, 10, 9, 0)]
    tensors = {name: {kind: tensor.clone() for kind, tensor in moved.tensors[LINEAR].items()} for name in names}
    write_adapter(tmp_path, replace(moved, tensors=tensors))
    assert [name.split(".")[1] for name in read_adapter(tmp_path).tensors] == ["0", "2", "9", "10"]


def test_a_missing_file_is_refused(tmp_path):
    assert refusal(tmp_path) == f"{tmp_path / WEIGHTS_FILE}: is missing"


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.999])
def test_a_file_that_is_cut_short_is_refused(written, part):
    data = (written / WEIGHTS_FILE).read_bytes()
    (written / WEIGHTS_FILE).write_bytes(data[: int(len(data) * part)])
    assert "is not a complete safetensors file" in refusal(written)


@pytest.mark.parametrize("name", ["lora_adapter_metadata", "ccmdist"])
def test_a_file_without_its_settings_is_refused(written, name):
    tensors, metadata = stored(written)
    metadata.pop(name)
    save_file(tensors, written / WEIGHTS_FILE, metadata=metadata)
    assert f"has no {name} in its metadata, so its alpha and kind are not known" in refusal(written)


def changed_settings(folder, **values):
    tensors, metadata = stored(folder)
    ours = json.loads(metadata["ccmdist"])
    metadata["ccmdist"] = json.dumps({**ours, "settings": ours["settings"] | values})
    save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)


def test_an_unknown_kind_is_refused(written):
    changed_settings(written, kind="vera")
    message = refusal(written)
    assert "adapter: Input tag 'vera' found" in message
    assert "'wdlora', 'lora'" in message


def test_settings_that_contradict_those_for_peft_are_refused(written):
    changed_settings(written, alpha=3.0)
    assert "its lora_adapter_metadata is not that of its tensors and settings" in refusal(written)


def test_another_format_is_refused(written):
    tensors, metadata = stored(written)
    metadata["ccmdist"] = json.dumps({**json.loads(metadata["ccmdist"]), "format_version": 9})
    save_file(tensors, written / WEIGHTS_FILE, metadata=metadata)
    assert "has format 9, this version reads 1" in refusal(written)
    save_file(tensors, written / WEIGHTS_FILE, metadata=metadata | {"ccmdist": "{"})
    assert "its metadata cannot be read" in refusal(written)


def with_tensor(folder, suffix, change):
    tensors, metadata = stored(folder)
    key = f"transformer.{LINEAR}.{suffix}"
    value = change(tensors.pop(key))
    save_file(tensors | ({} if value is None else {key: value}), folder / WEIGHTS_FILE, metadata=metadata)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        ("lora_A.weight", lambda t: t[:3].clone(), "lora_A is 3 x 128, expected 4 x 128"),
        ("lora_B.weight", lambda t: t[:, :2].clone(), "lora_B is 128 x 2, expected 128 x 4"),
        ("lora_A.weight", lambda t: t[0].clone(), "lora_A is 128, expected 4 x 128"),
        ("lora_B.weight", lambda t: t * float("nan"), "lora_B holds values that are not finite"),
        ("lora_A.weight", lambda t: t / 0, "lora_A holds values that are not finite"),
        ("lora_B.weight", lambda t: None, "holds lora_A"),
    ],
)
def test_tensors_that_do_not_fit_are_named(written, suffix, change, message):
    with_tensor(written, suffix, change)
    assert f"{LINEAR}: {message}" in refusal(written)


def test_a_foreign_tensor_is_refused(written):
    tensors, metadata = stored(written)
    save_file(tensors | {"text_encoder.a.lora_A.weight": torch.zeros(1)}, written / WEIGHTS_FILE, metadata=metadata)
    assert "holds text_encoder.a.lora_A.weight, which is not the name of an adapter's tensor" in refusal(written)


def test_what_is_not_sound_is_not_written(moved, tmp_path):
    broken = replace(moved, tensors={LINEAR: {"lora_A": moved.tensors[LINEAR]["lora_A"]}})
    with pytest.raises(AdapterError, match=re.escape(f"{tmp_path}: {LINEAR}: holds lora_A, expected lora_A, lora_B")):
        write_adapter(tmp_path, broken)
    with pytest.raises(AdapterError, match="adapts nothing"):
        write_adapter(tmp_path, replace(moved, tensors={}))
    assert not list(tmp_path.iterdir())


def test_a_base_with_other_linears_is_named(moved, tmp_path):
    shapes = {name: (len(t["lora_B"]), t["lora_A"].shape[1]) for name, t in moved.tensors.items()}
    moved.check_fits(shapes, tmp_path)
    with pytest.raises(AdapterError, match=re.escape(f"linear {LINEAR} is 64 x 128, the adapter expects 128 x 128")):
        moved.check_fits(shapes | {LINEAR: (64, 128)}, tmp_path)
    shapes.pop(LINEAR)
    with pytest.raises(AdapterError, match=f"linear {LINEAR} is missing"):
        moved.check_fits(shapes, tmp_path)
