"""Adapters of other families than Qwen-Image-Edit: stock diffusers loads what was trained, tensor by tensor."""

import dataclasses
import tarfile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ccmdist.adapters.rank_map import RankMap
from ccmdist.adapters.state import WEIGHTS_FILE, AdapterState, read_adapter, write_adapter
from ccmdist.cli import exit_code
from ccmdist.config.loading import load
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import LoRASettings, TrainConfig, WDLoRASettings
from ccmdist.diagnostics.checks.adapter_size import num_values
from ccmdist.errors import AdapterError, ConfigError, ModelError, RunError
from ccmdist.jobs import adapter, adapter_check
from ccmdist.jobs.adapter_show import show
from ccmdist.jobs.model import TINY, convert, make
from ccmdist.jobs.model_plan import base_of
from ccmdist.jobs.synthesize import describe
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import base
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.verify import verify_against_plan

SETTINGS = {"wdlora": WDLoRASettings(lora_rank=4, alpha=8.0), "lora": LoRASettings(lora_rank=4, alpha=6.0)}


@pytest.fixture(scope="module", params=list(TINY))
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / request.param
    make("tiny", None, path, 0, False, request.param)
    return ModelFolder.open(path)


def moved(folder, settings):
    """An adapter of all targets, well away from its base."""
    backbone, source = backbone_of(folder), torch.Generator().manual_seed(5)
    model = backbone.build(torch.float32, None)
    tensors = {}
    for name in backbone.linear_names(model, settings.targets):
        W = model.get_submodule(name).weight.detach()
        tensors[name] = {
            "lora_A": torch.randn(settings.lora_rank, W.shape[1], generator=source) / W.shape[1] ** 0.5,
            "lora_B": 0.05 * torch.randn(W.shape[0], settings.lora_rank, generator=source),
        }
        if settings.kind == "wdlora":
            tensors[name]["magnitude"] = W.norm(dim=1) * (1 + 0.1 * torch.randn(W.shape[0], generator=source))
    return AdapterState(settings, tensors, {"base_digest": folder.transformer_digest(), "step": "7"})


@pytest.mark.parametrize("kind", list(SETTINGS))
def test_an_exported_adapter_gives_stock_diffusers_what_was_trained(folder, kind, tmp_path, monkeypatch):
    state = moved(folder, SETTINGS[kind])
    write_adapter(tmp_path / "adapter", state)
    adapter.export(tmp_path / "adapter", folder.path, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS_FILE,
    ], "its names in ComfyUI are not known"
    assert read_adapter(tmp_path / "out").facts["pipeline"] == folder.pipeline
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"Adapter for {folder.title}" in card
    assert folder.layout.licence in card
    assert "Apache" not in card
    agreement = adapter_check.compare(folder, tmp_path / "out")
    # The tensors are equal; terms are added in another order, and Kandinsky rounds queries and keys to bf16.
    assert agreement.stock <= folder.layout.output_tolerance / 5
    assert agreement.merged <= folder.layout.output_tolerance / 5
    monkeypatch.setattr(adapter_check, "LARGE_BYTES", 0)
    first, second = adapter_check.block_counts(folder).values()
    lasts = (first - 1, first + second - 1)
    monkeypatch.setattr(adapter_check, "_ends", lambda counts: lasts)
    assert adapter_check.compare(folder, tmp_path / "out").blocks == lasts, "one block of each list, numbered anew"
    adapter.merge(tmp_path / "out", folder.path, tmp_path / "merged")
    name = next(iter(state.tensors))
    folders = (folder.path / "transformer", tmp_path / "merged")
    before, after = (load_file(path / "diffusion_pytorch_model.safetensors") for path in folders)
    assert not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    out = tmp_path_factory.mktemp("shards") / "set"
    few = ["size_px=64", "subjects_per_group=3", "frames_per_subject=1", "val_fraction=0.3", "test_fraction=0.3"]
    assert exit_code(["shards", "phantom", f"out={out}", *few]) == 0
    return out


def test_a_set_is_drawn_with_an_adapter_as_it_was_planned_from_a_cache_that_has_each_prompt_once(
    folder, phantoms, tmp_path, caplog
):
    adapter_folder, drawn = tmp_path / "adapter", tmp_path / "drawn"
    write_adapter(adapter_folder, moved(folder, SETTINGS["wdlora"]))
    data = [f"data.model={folder.path}", f"data.shards={phantoms}", f"data.cache={tmp_path}/cache"]
    data += ["data.image_size_px=64", "data.dtype=fp32"]
    assert exit_code(["precompute", *data, "splits=[test]"]) == 0
    (cached,) = (tmp_path / "cache").glob("*/*.tar")
    with tarfile.open(cached) as tar:
        texts = [name for name in tar.getnames() if name.startswith("text-")]
    # One of each group's prompt and of the negative prompt; Kandinsky's see the mask and are each sample's own.
    assert len(texts) == (0 if folder.kind == "kandinsky5" else 3 + 1)
    drawing = ["synthesize", *data, f"adapter={adapter_folder}", "denoise_steps=2", "guidance_scale=2"]
    assert exit_code([*drawing, f"out={drawn}", "images_per_mask=2"]) == 0
    assert "all 6 images of plan" in verify_against_plan(drawn, phantoms)
    is_told = f"guidance_scale=2: {folder.title} is told its guidance, and is now guided a second time"
    assert (is_told in caplog.text) == (folder.kind != "kandinsky5")
    assert exit_code([*drawing, "adapter=null", f"out={tmp_path}/untuned", "images_per_mask=2"]) == 0
    first, second = (next(path.glob("test-*.tar")).read_bytes() for path in (drawn, tmp_path / "untuned"))
    assert first != second, "the adapter has been at work"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ["objective=completion", "data.holes.per_sample=1"],
            r"objective: completion shows a model two condition images, (FLUX|Kandinsky).* takes 1; set data.model",
        ),
        (["base=nf4"], r"base: nf4 is for Qwen-Image-Edit alone, .* holds (FLUX|Kandinsky).*; leave it out"),
        (["compile_blocks=true"], r"compile_blocks: is for Qwen-Image-Edit alone, .* holds (FLUX|Kandinsky).*; leave"),
    ],
)
def test_what_a_model_cannot_draw_is_refused_before_its_cache_is_asked_for(folder, settings, message, tmp_path):
    data = [f"data.model={folder.path}", f"data.shards={tmp_path}/none", f"data.cache={tmp_path}/cache"]
    config = load(SynthesizeConfig, [], [f"out={tmp_path}/out", *data, *settings])
    for ask in (describe, lambda config: synthesize(config, None)):
        with pytest.raises(ConfigError, match=message):
            ask(config)


def test_a_card_that_is_too_small_is_not_told_of_a_form_that_the_model_has_not(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_shortage", lambda *_: "the base in bf16 is too large")
    settings = SimpleNamespace(base="bf16", dtype="bf16")
    with pytest.raises(RunError, match=r"too large; run it on cards with more memory$"):
        base.refuse_small_card(tmp_path, folder, settings, None)
    assert base.base_for_card(folder, "bf16") == "bf16"


def test_blocks_of_one_number_in_two_lists_have_a_place_each_in_the_map_of_ranks(folder):
    backbone = backbone_of(folder)
    names = backbone.linear_names(backbone.skeleton(), ("attn", "mlp"))
    ranks = dict(zip(names, range(1, len(names) + 1), strict=True))
    found = RankMap.of(ranks)
    assert found.ranks.sum() == sum(ranks.values())
    assert {one.removeprefix("single_").removeprefix("text_").removeprefix("visual_") for one in found.projections} == {
        name.split(".", 2)[2] for name in names
    }


def test_the_doctor_counts_the_linears_of_all_lists_of_blocks(folder, tmp_path):
    config = TrainConfig(data={"model": folder.path, "shards": tmp_path}, run=tmp_path, adapter={"lora_rank": 4})
    trained = moved(folder, WDLoRASettings(lora_rank=4)).tensors.values()
    assert num_values(config) == sum(tensor.numel() for of in trained for tensor in of.values())


def test_an_adapter_that_stock_diffusers_would_load_otherwise_is_refused(folder, tmp_path):
    state = moved(folder, SETTINGS["wdlora"])
    tensors = {name.replace("to_q", "to_z"): of for name, of in state.tensors.items()}
    write_adapter(tmp_path / "adapter", AdapterState(state.settings, tensors, state.facts))
    with pytest.raises(AdapterError, match="to_z"):
        adapter.verify(tmp_path / "adapter", folder.path)


def test_the_ends_of_all_lists_of_blocks_are_compared_in_a_large_model():
    assert adapter_check._ends({"transformer_blocks": 19, "single_transformer_blocks": 38}) == (0, 18, 19, 56)
    assert adapter_check._ends({"transformer_blocks": 1, "single_transformer_blocks": 0}) == (0,)


@pytest.mark.parametrize(
    ("kind", "size", "fitted", "message"),
    [
        ("flax", "tiny", False, "--kind: 'flax' is not known; use one of qwen, flux"),
        ("flux", "full", False, "--kind flux: is made in size tiny and one version alone"),
        ("flux", "tiny", True, "--kind flux: is made in size tiny and one version alone"),
    ],
)
def test_what_cannot_be_made_is_refused(kind, size, fitted, message, tmp_path):
    with pytest.raises(ConfigError) as told:
        make(size, None, tmp_path / "model", 0, fitted, kind)
    assert message in str(told.value)
    with pytest.raises(ConfigError, match=r"leave out --size, --version and --fitted"):
        make("tiny", "2511", tmp_path / "model", 0, False, "kandinsky5")
    assert not (tmp_path / "model").exists()


def test_a_table_of_modulation_that_there_cannot_be_is_refused(folder, tmp_path):
    with pytest.raises(ModelError, match=r"depends on the text too, so that there is no table of it; train on the"):
        convert(folder.path, tmp_path / "out", 128, [4], "fp32", 1)
    assert not (tmp_path / "out").exists()


def test_no_plan_is_made_with_the_sizes_of_another_model(folder, tmp_path):
    for path in (folder.path, tmp_path / "FLUX.1-Kontext-dev"):
        config = TrainConfig(data={"model": path, "shards": tmp_path}, run=tmp_path)
        with pytest.raises(
            ConfigError, match=r"data\.model: (FLUX|Kandinsky).* is not planned for, only adapters on Q"
        ):
            base_of(config)


def test_facts_are_shown_as_they_are_written(folder, tmp_path, capsys):
    """A licence with words in brackets, which the library for tables would take for a style."""
    state = moved(folder, SETTINGS["lora"])
    write_adapter(tmp_path, dataclasses.replace(state, facts={**state.facts, "base_licence": "FLUX.1 [dev] License"}))
    show(tmp_path)
    assert "FLUX.1 [dev] License" in capsys.readouterr().out
