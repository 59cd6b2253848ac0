"""Both language models are called as their own processors call them, and folders that cannot be used are refused."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText, MllamaTextConfig, Qwen2_5_VLConfig, Qwen2_5_VLModel

from ccmdist.ccm.diagnosis_prompts import all_diagnosis_prompts
from ccmdist.config.objectives.mdf_mllm import SegmentSettings
from ccmdist.errors import ConfigError, ModelError
from ccmdist.jobs.model import make
from ccmdist.models.make_mllm import make_mllm
from ccmdist.models.mdf_base import KINDS as KNOWN
from ccmdist.models.mdf_base import mllm_digest
from ccmdist.models.mllm import MLLMS, Prompts, load_mllm
from ccmdist.models.processor import make_processor
from ccmdist.models.unet import make_unet
from tests.small_mdf import CHANNELS, KINDS, make_mllms


@pytest.fixture(scope="module")
def mllms(tmp_path_factory):
    make_mllms(folder := tmp_path_factory.mktemp("mllms"))
    return folder


@pytest.fixture
def copied(mllms, tmp_path):
    shutil.copytree(mllms / "mllama", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("kind", KINDS)
def test_states_depend_on_image_and_prompt_and_not_on_what_a_prompt_is_padded_with(mllms, kind):
    folder, texts = mllms / kind, all_diagnosis_prompts()
    model, all_of, alone = (
        load_mllm(folder, torch.float32),
        Prompts(folder, texts, 64),
        Prompts(folder, texts[:1], 64),
    )
    padded, short = all_of.of(texts[0]), alone.of(texts[0])
    assert len(padded["prompt_ids"]) > len(short["prompt_ids"]) == short["prompt_last"] + 1
    images = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def state(images, asked):
        with torch.no_grad():
            states = model.states(images, asked["prompt_ids"].expand(len(images), -1))
        return states[:, asked["prompt_last"]]

    found = state(images, padded)
    assert found.shape == (2, model.hidden_size)
    torch.testing.assert_close(found, state(images, short), rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1:], state(images[1:], padded), rtol=0, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 1e-2
    assert (found - state(images, all_of.of(texts[-1]))).abs().max() > 1e-2


def test_patches_and_places_of_qwen_are_those_of_its_processor_and_model(mllms):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 112, 112)).astype(np.uint8)
    model = load_mllm(mllms / "qwen2_5_vl", torch.float32)
    text = all_diagnosis_prompts()[0]
    expected = make_processor(model.tokenizer, 28 * 28 * 16)(
        text=[f"<|vision_start|><|image_pad|><|vision_end|>{text}"] * 2,
        images=[Image.fromarray(picture).convert("RGB") for picture in pixels],
        return_tensors="pt",
    )
    ids = Prompts(mllms / "qwen2_5_vl", [text], 112).of(text)["prompt_ids"].expand(2, -1)
    assert torch.equal(ids, expected["input_ids"])
    images = torch.from_numpy(pixels)[:, None].float() / 255
    found = model.spec.inputs(model.config, images, ids)
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    torch.testing.assert_close(found["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)


def test_an_image_of_mllama_is_the_first_of_its_tiles(mllms):
    model = load_mllm(mllms / "mllama", torch.float32)
    model.config.vision_config.max_num_tiles = 4
    model.config.vision_config.supported_aspect_ratios = [[1, 1], [1, 2]]
    found = model.spec.inputs(model.config, torch.rand(2, 1, 56, 56), torch.zeros(2, 7, dtype=torch.long))
    assert found["pixel_values"].shape == (2, 1, 4, 3, 56, 56)
    assert found["pixel_values"][:, :, 0].any()
    assert not found["pixel_values"][:, :, 1:].any()
    assert found["aspect_ratio_ids"].tolist() == [[1], [1]]
    assert found["aspect_ratio_mask"].tolist() == [[[1, 0, 0, 0]]] * 2
    assert found["cross_attention_mask"].shape == (2, 7, 1, 4)
    assert found["cross_attention_mask"].sum() == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_those_of_transformers_own_reading_from_one_file_or_several(
    mllms, tmp_path, kind, dtype
):
    stock = AutoModel.from_pretrained(str(mllms / kind), local_files_only=True, dtype=dtype)
    whole = AutoModelForImageTextToText.from_pretrained(str(mllms / kind), local_files_only=True)
    whole.save_pretrained(tmp_path, max_shard_size="200KB")
    for file in (mllms / kind).glob("*token*"):
        shutil.copy(file, tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    images = torch.rand(2, 1, 64, 64) * 2 - 1
    asked = (
        Prompts(mllms / kind, all_diagnosis_prompts(), 64).of(all_diagnosis_prompts()[0])["prompt_ids"].expand(2, -1)
    )
    for folder in (mllms / kind, tmp_path):
        found = load_mllm(folder, dtype)
        for (name, one), (_, other) in zip(found.model.named_parameters(), stock.named_parameters(), strict=True):
            assert one.dtype == other.dtype == dtype, name
            assert torch.equal(one, other), name
        for (name, one), (_, other) in zip(found.model.named_buffers(), stock.named_buffers(), strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other), name
        states = found.states(images, asked)
        object.__setattr__(found, "model", stock)
        assert torch.equal(found.states(images, asked), states)
    next(tmp_path.glob("model-0000*")).unlink()
    with pytest.raises(ModelError, match=r"as model\.safetensors\.index\.json has it; name a local folder"):
        load_mllm(tmp_path, dtype)


@pytest.mark.parametrize(
    ("kind", "stored", "name"),
    [
        ("mllama", "language_model.model.layers.3.cross_attn.q_proj.weight", "layers.3.cross_attn.q_proj.weight"),
        ("mllama", "model.language_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("qwen2_5_vl", "model.layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_proj.bias"),
        ("qwen2_5_vl", "model.language_model.layers.0.self_attn.q_proj.bias", "layers.0.self_attn.q_proj.bias"),
    ],
)
def test_names_in_published_files_and_in_those_of_transformers_5_are_known(kind, stored, name):
    assert MLLMS[kind].module_name(stored) == f"language_model.{name}"
    for part in ("vision_model.class_embedding", "multi_modal_projector.weight", "visual.merger.mlp.0.weight"):
        if (kind == "mllama") != part.startswith("visual"):
            assert MLLMS[kind].module_name(part) == MLLMS[kind].module_name(f"model.{part}") == part
    for head in {"mllama": ("language_model.lm_head.weight", "lm_head.weight"), "qwen2_5_vl": ("lm_head.weight",)}[
        kind
    ]:
        assert MLLMS[kind].module_name(head) is None


def test_the_folder_knows_the_kinds_that_there_are():
    assert set(KNOWN) == set(MLLMS)


def test_levels_are_read_evenly_over_the_depth_of_the_published_models():
    assert MLLMS["mllama"].depths(MllamaTextConfig()) == (3, 13, 23, 33)
    published = Qwen2_5_VLConfig(text_config={"num_hidden_layers": 28}).text_config
    assert MLLMS["qwen2_5_vl"].depths(published) == (6, 13, 20, 27)


def test_a_folder_is_known_by_its_content(mllms, copied):
    assert mllm_digest(copied) == mllm_digest(mllms / "mllama")
    (copied / "generation_config.json").write_text("{}")
    assert mllm_digest(copied) != mllm_digest(mllms / "mllama")


def test_folders_that_cannot_be_used_are_refused_with_what_to_do(mllms, copied, tmp_path):
    def refused(problem, folder=copied):
        with pytest.raises(ModelError, match=problem):
            load_mllm(folder, torch.float32)

    refused("there is no such folder; name a local folder of Mllama or Qwen2.5-VL", tmp_path / "none")
    weights = copied / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused("holds no weights; accept the licence on the model's page")
    weights.unlink()
    refused("holds no weights; accept the licence on the model's page")
    weights.write_bytes(whole[:-100])
    refused("cannot be read")
    weights.write_bytes(whole)
    config = json.loads((copied / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    (copied / "config.json").write_text(json.dumps(config))
    refused(r"mlp.\w+.weight has shape .*, expected .*; use config.json and weights of the same checkpoint")
    (copied / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("is a model of type bert, expected mllama or qwen2_5_vl")
    (copied / "config.json").write_text("<html>")
    refused("config.json: cannot be read .*; accept the licence on the model's page")
    for file in copied.iterdir():
        file.unlink()
    (copied / "README.md").write_text("Access to this model is restricted.")
    refused("holds no config.json; accept the licence on the model's page")


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_a_tokenizer_is_refused_instead_of_asking_nothing(mllms, tmp_path, kind):
    """Of Qwen2.5-VL transformers makes a tokenizer without words, for which every prompt is empty."""
    copy = shutil.copytree(mllms / kind, tmp_path / kind)
    (copy / "tokenizer.json").unlink()
    for use in (mllm_digest, lambda folder: Prompts(folder, ["nerves"], 64)):
        with pytest.raises(ModelError, match=r"holds no tokenizer \(none of tokenizer.json, tokenizer.model, vocab"):
            use(copy)


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("hidden_size", "x", "config.json cannot be read .*'hidden_size' expected int, got str"),
        ("num_attention_heads", 7, "its config.json makes no model .*must be divisible by num_heads"),
    ],
)
def test_a_config_that_transformers_refuses_is_told_in_its_words(mllms, tmp_path, name, value, problem):
    copy = shutil.copytree(mllms / "qwen2_5_vl", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    config["text_config"][name] = value
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=problem):
        load_mllm(copy, torch.float32)


def test_a_prompt_that_is_longer_than_the_model_takes_is_refused_with_both_numbers(mllms):
    with pytest.raises(ModelError, match=r"prompt and image take \d{3,} tokens, the model takes 512"):
        Prompts(mllms / "mllama", ["nerve " * 600], 64)


def test_a_tiny_model_is_made_by_the_command_that_makes_models_and_never_over_another(mllms, tmp_path):
    make("tiny", None, tmp_path / "one", 0, False, "qwen2_5_vl")
    assert mllm_digest(tmp_path / "one") == mllm_digest(mllms / "qwen2_5_vl")
    with pytest.raises(ModelError, match="already holds a model"):
        make_mllm("mllama", tmp_path / "one")
    with pytest.raises(ConfigError, match="--kind mllama: is made in size tiny and one version alone"):
        make("small", None, tmp_path / "two", 0, False, "mllama")
    loaded = load_mllm(tmp_path / "one", torch.float32).model
    stock = Qwen2_5_VLModel.from_pretrained(str(tmp_path / "one"), local_files_only=True, dtype=torch.float32)
    for (name, one), (_, other) in zip(loaded.named_parameters(), stock.named_parameters(), strict=True):
        assert torch.equal(one, other), name


def test_levels_of_the_unet_have_half_the_edge_each_and_decode_to_what_the_whole_network_finds():
    unet, images = make_unet(SegmentSettings(channels=CHANNELS), 0), torch.randn(2, 1, 64, 64)
    levels = unet.levels(images)
    assert [tuple(level.shape[1:]) for level in levels] == [
        *((4, 64, 64), (4, 32, 32), (8, 16, 16), (8, 8, 8), (16, 4, 4))
    ]
    assert torch.equal(unet.decoded(levels), unet(images))
    assert torch.equal(super(type(unet), unet).forward(images), unet(images))
    assert not list(unet.buffers())
