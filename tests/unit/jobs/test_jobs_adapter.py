"""`ccmdist adapter`: what it publishes loads in stock diffusers, what does not agree is not published."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from ccmdist.adapters import state as state_module
from ccmdist.adapters.merge import merge_into
from ccmdist.adapters.state import WEIGHTS_FILE, read_adapter, write_adapter
from ccmdist.cli import exit_code
from ccmdist.cluster.best_checkpoint import BestCheckpoint
from ccmdist.errors import AdapterError, CheckpointError, ModelError
from ccmdist.jobs import adapter, adapter_check, adapter_show
from ccmdist.models import mmdit
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.checkpoint import sealed
from tests.unit.jobs.made_adapters import make_run, moved_state


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("tiny", "2509", path)
    return ModelFolder.open(path)


@pytest.fixture(params=["wdlora", "lora"])
def state(request, tiny):
    """An adapter whose alpha is not its rank, well away from its base."""
    return moved_state(tiny, request.param)


wdlora_alone = pytest.mark.parametrize("state", ["wdlora"], indirect=True)


@pytest.fixture
def written(state, tmp_path):
    write_adapter(tmp_path / "adapter", state)
    return tmp_path / "adapter"


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_an_exported_adapter_gives_stock_diffusers_what_was_trained(tiny, state, written, tmp_path):
    adapter.export(written, tiny.path, tmp_path / "out")
    assert files(tmp_path / "out") == ["README.md", "adapter_config.json", "comfyui.safetensors", WEIGHTS_FILE]
    assert files(tmp_path) == ["adapter", "out"], "nothing temporary is left"
    agreement = adapter_check.compare(tiny, tmp_path / "out")
    assert agreement.merged <= 1e-5
    # PEFT's DoRA adds the same terms in another order, its LoRA in the same one.
    assert agreement.stock <= 1e-5 if state.settings.kind == "wdlora" else agreement.stock == 0
    facts = read_adapter(tmp_path / "out").facts
    assert (facts["model_version"], facts["pipeline"], facts["step"]) == ("2509", "QwenImageEditPlusPipeline", "7")


def test_the_file_loads_to_the_very_output_of_peft_with_the_same_tensors(tiny, state, written):
    """Stock diffusers from the file, against PEFT set up by hand: no difference at all."""
    from diffusers import QwenImageEditPlusPipeline, QwenImageTransformer2DModel
    from peft import LoraConfig, inject_adapter_in_model

    def base():
        return QwenImageTransformer2DModel.from_pretrained(tiny.path / "transformer", torch_dtype=torch.float32)

    absent = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "processor"))
    pipe = QwenImageEditPlusPipeline(transformer=base(), **absent)
    pipe.load_lora_weights(str(written))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=state.settings.kind == "wdlora",
        target_modules=list(state.tensors),
        init_lora_weights=False,
    )
    by_hand = inject_adapter_in_model(config, base(), adapter_name="a")
    with torch.no_grad():
        for name, tensors in state.tensors.items():
            layer = by_hand.get_submodule(name)
            layer.lora_A["a"].weight.copy_(tensors["lora_A"])
            layer.lora_B["a"].weight.copy_(tensors["lora_B"])
            if "magnitude" in tensors:
                layer.lora_magnitude_vector["a"].weight.copy_(tensors["magnitude"])
    assert torch.equal(adapter_check._output(pipe.transformer), adapter_check._output(by_hand))


@wdlora_alone
def test_without_its_alpha_an_adapter_is_not_published(tiny, written, tmp_path, monkeypatch):
    whole = state_module.peft_settings
    monkeypatch.setattr(state_module, "peft_settings", lambda state: {**whole(state), "lora_alpha": 4.0})
    monkeypatch.setattr(adapter, "find", lambda path, name: moved_state(tiny, "wdlora"))
    with pytest.raises(AdapterError, match=r"has scale 1\.0 there, 2\.0 here"):
        adapter.export(written, tiny.path, tmp_path / "out")
    assert files(tmp_path) == ["adapter"]


def test_every_kind_of_disagreement_is_found(tiny, written, monkeypatch):
    state = read_adapter(written)
    name = "transformer_blocks.1.attn.to_k"

    def checked_against(tensors):
        model = adapter_check.base_blocks(tiny, (0, 1, 2, 3))
        monkeypatch.setattr(adapter_check, "_output", lambda model: None)
        adapter_check._stock_output(model, tiny, written, replace(state, tensors=tensors))

    checked_against(state.tensors)
    one = dict(state.tensors[name])
    one["lora_B"] = one["lora_B"].nextafter(torch.tensor(9.0))
    with pytest.raises(AdapterError, match=f"lora_B of {name} differs"):
        checked_against({**state.tensors, name: one})
    fewer = {other: tensors for other, tensors in state.tensors.items() if other != name}
    with pytest.raises(AdapterError, match=f"{name} is adapted by only one of the two \\(1 such linears\\)"):
        checked_against(fewer)
    one = {"lora_A": one["lora_A"], "lora_B": one["lora_B"], "magnitude": torch.ones(128)}
    one.popitem() if state.settings.kind == "wdlora" else None
    with pytest.raises(AdapterError, match=f"{name} has lora_A"):
        checked_against({**state.tensors, name: one})


@wdlora_alone
def test_outputs_that_differ_or_are_not_numbers_are_refused(tiny, written, monkeypatch):
    for spoilt in (lambda model, state: torch.ones(1, 16, 64), lambda model, state: torch.full((1, 16, 64), torch.nan)):
        monkeypatch.setattr(adapter_check, "_merged_output", spoilt)
        with pytest.raises(AdapterError, match="the output of the merged model differs by"):
            adapter_check.compare(tiny, written)


@wdlora_alone
def test_of_a_large_model_the_first_and_the_last_block_are_compared(tiny, written, monkeypatch):
    monkeypatch.setattr(adapter_check, "LARGE_BYTES", 0)
    agreement = adapter_check.compare(tiny, written)
    assert agreement.blocks == (0, 3)
    assert "blocks 0, 3 of 4" in str(agreement)
    part = adapter_check.part_of(read_adapter(written), (0, 3), adapter_check.block_counts(tiny))
    last = read_adapter(written).tensors["transformer_blocks.3.attn.to_q"]["lora_A"]
    assert torch.equal(part.tensors["transformer_blocks.1.attn.to_q"]["lora_A"], last)
    whole = mmdit.build(tiny, torch.float32, None)
    two = adapter_check.base_blocks(tiny, (0, 3))
    assert torch.equal(two.transformer_blocks[1].attn.to_q.weight, whole.transformer_blocks[3].attn.to_q.weight)


def test_a_merged_folder_is_the_base_but_for_the_adapted_weights(tiny, state, written, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    out, base = tmp_path / "merged", tiny.path / "transformer"
    adapter.merge(written, tiny.path, out)
    assert files(out) == files(base)
    expected = mmdit.build(tiny, torch.bfloat16, None)
    merge_into(expected, state)
    model = QwenImageTransformer2DModel.from_pretrained(out, torch_dtype=torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as before, safe_open(out / file.name, "pt") as after:
            for name in before.keys():  # noqa: SIM118
                one, other = before.get_tensor(name), after.get_tensor(name)
                assert one.dtype == other.dtype == torch.bfloat16
                assert torch.equal(one, other) == (name.removesuffix(".weight") not in state.tensors), name
    with pytest.raises(AdapterError, match="already holds a model; choose another folder"):
        adapter.merge(written, tiny.path, out)


@wdlora_alone
def test_a_merge_that_was_interrupted_is_done_again(tiny, written, tmp_path, monkeypatch):
    out = tmp_path / "merged"
    with monkeypatch.context() as patched:
        patched.setattr(adapter, "_merge_into_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            adapter.merge(written, tiny.path, out)
    assert files(out) == [], "what is not complete does not appear"
    adapter.merge(written, tiny.path, out)
    assert (out / "config.json").is_file()


def test_an_adapter_is_found_in_a_run_in_a_checkpoint_and_in_its_own_folder(tiny, state, written, tmp_path):
    run = make_run(tmp_path / "run", tiny, state)
    name = "transformer_blocks.2.attn.to_v"
    for path, factor in ((run, 1), (run / "checkpoints" / "step-00000003", 3 / 7), (written, 1)):
        found = adapter.find(path)
        assert found.settings == state.settings
        assert torch.equal(found.tensors[name]["lora_B"], state.tensors[name]["lora_B"] * factor), path
    facts = adapter.find(run).facts
    assert facts["step"] == "7"
    assert facts["samples_seen"] == "112"
    assert (facts["data_digest"], facts["image_size_px"], facts["weights"]) == ("d" * 64, "64", "last")
    assert (facts["model_version"], "base_model" in facts) == ("2509", False)
    adapter.verify(run, tiny.path)


@wdlora_alone
def test_the_pointer_to_the_best_checkpoint_stands_for_it(tiny, state, tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny, state)
    best = BestCheckpoint(3, "checkpoints/step-00000003", "cldice", 0.5, 6, 3).commit(run)
    assert adapter.find(best).facts["step"] == "3"
    assert adapter.find(run).facts["step"] == "7"
    adapter.export(best, tiny.path, tmp_path / "out")
    assert read_adapter(tmp_path / "out").facts["step"] == "3"
    adapter_show.show(best)
    assert re.search(r"^step +3$", capsys.readouterr().out, re.MULTILINE)


@wdlora_alone
def test_the_moving_average_is_what_is_exported(tiny, state, tmp_path):
    run = make_run(tmp_path / "run", tiny, state, average=True)
    name = "transformer_blocks.2.attn.to_v"
    found = adapter.find(run)
    assert torch.equal(found.tensors[name]["lora_B"], state.tensors[name]["lora_B"] * 0.5)
    assert found.facts["weights"] == "moving average"


@wdlora_alone
def test_a_broken_checkpoint_is_passed_over_in_a_run_and_refused_by_itself(tiny, state, tmp_path):
    run = make_run(tmp_path / "run", tiny, state)
    newest = run / "checkpoints" / "step-00000007"
    (newest / "slices-00001.safetensors").write_bytes(b"")
    assert adapter.find(run).facts["step"] == "3"
    with pytest.raises(CheckpointError, match=r"slices-00001\.safetensors differs from what was committed"):
        adapter.find(newest)


@wdlora_alone
def test_a_run_without_checkpoints_has_its_exported_adapter(tiny, state, tmp_path):
    run = make_run(tmp_path / "run", tiny, state, steps=())
    with pytest.raises(
        AdapterError, match=r"holds neither pytorch_lora_weights\.safetensors nor a checkpoint that is whole"
    ):
        adapter.find(run)
    write_adapter(run / "adapter", state)
    assert adapter.find(run).facts["step"] == "7"


@wdlora_alone
def test_a_checkpoint_without_the_settings_of_its_run_is_refused(tiny, state, tmp_path):
    run = make_run(tmp_path / "run", tiny, state)
    (run / "config.json").unlink()
    with pytest.raises(
        ModelError, match="so the settings of what was trained are not known; keep checkpoints in the folder"
    ):
        adapter.find(run)


@wdlora_alone
def test_a_checkpoint_of_something_else_is_refused(tiny, state, tmp_path):
    run = make_run(tmp_path / "run", tiny, state, steps=(7,))
    manifest = run / "checkpoints" / "step-00000007" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["parameters"]["decoder.weight"] = [1]
    manifest.write_text(json.dumps(sealed(values)))
    with pytest.raises(AdapterError, match=r"decoder\.weight is not a parameter of an adapter"):
        adapter.find(run)


@wdlora_alone
def test_another_base_is_refused_with_exit_code_78(tiny, state, written, tmp_path, capsys):
    make_model("tiny", "2509", tmp_path / "other", seed=1)
    for command in ("export", "merge"):
        arguments = [
            "adapter",
            command,
            str(written),
            "--model",
            str(tmp_path / "other"),
            "--out",
            str(tmp_path / "out"),
        ]
        assert exit_code(arguments) == 78
        assert f"the adapter was trained on {tiny.transformer_digest()[:12]}" in capsys.readouterr().err
    assert exit_code(["adapter", "verify", str(written), "--model", str(tmp_path / "other")]) == 78
    assert not (tmp_path / "out").exists()


@wdlora_alone
def test_a_folder_in_use_is_not_written_over(tiny, written):
    with pytest.raises(AdapterError, match="already exists; choose another folder"):
        adapter.export(written, tiny.path, written)


def test_show_tells_size_origin_and_movement(tiny, state, written, tmp_path, capsys):
    def shown(path):
        assert exit_code(["adapter", "show", str(path)]) == 0
        return capsys.readouterr().out

    text = shown(written)
    assert f"{state.settings.kind}, rank 4, alpha 8" in text
    row = next(line for line in text.splitlines() if "img_mlp" in line)
    assert " 8 " in row, "linears"
    assert f"{sum(t.numel() for n, ts in state.tensors.items() if 'img_mlp' in n for t in ts.values()):,}" in row
    adapter.export(written, tiny.path, tmp_path / "out")
    run = make_run(tmp_path / "run", tiny, state)
    for path in (tmp_path / "out", run, run / "checkpoints" / "step-00000007"):
        row = next(line for line in shown(path).splitlines() if "img_mlp" in line)
        assert ("rad" in row) == (state.settings.kind == "wdlora"), path
