"""`ccmdist adapter` of ranks that have grown, and of two adapters of one run."""

import re

import pytest
import torch
from safetensors import safe_open

from ccmdist.adapters import state as state_module
from ccmdist.adapters.state import CONFIG_FILE, WEIGHTS_FILE, read_adapter, write_adapter
from ccmdist.cli import exit_code
from ccmdist.cluster.best_checkpoint import BestCheckpoint
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.errors import AdapterError
from ccmdist.jobs import adapter, adapter_check, train_rank
from ccmdist.jobs.trained import settings_of
from ccmdist.models import mmdit
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.checkpoint import verified
from tests.unit.jobs.made_adapters import DUAL, HOLES, make_run, moved_state


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model("tiny", "2509", path)
    return ModelFolder.open(path)


@pytest.fixture(params=["selora", "se-wdlora"])
def grown(request, tiny):
    return moved_state(tiny, request.param)


@pytest.fixture(scope="module")
def pair(tiny):
    """Two adapters as a run of `dual` trains them."""
    return {name: moved_state(tiny, "lora", seed) for seed, name in enumerate(("synthesis", "completion"))}


@pytest.fixture
def dual_run(tiny, pair, tmp_path):
    return make_run(tmp_path / "dual", tiny, pair, overrides=[DUAL, HOLES])


def same(found, expected, factor=1.0):
    assert found.tensors.keys() == expected.tensors.keys()
    return all(
        torch.equal(values, expected.tensors[name][kind] * factor)
        for name, tensors in found.tensors.items()
        for kind, values in tensors.items()
    )


def test_stock_diffusers_loads_every_rank_of_a_grown_adapter_bit_for_bit(tiny, grown, tmp_path):
    write_adapter(tmp_path / "adapter", grown)
    adapter.export(tmp_path / "adapter", tiny.path, tmp_path / "out")
    agreement = adapter_check.compare(tiny, tmp_path / "out")
    assert agreement.stock <= 1e-5
    assert agreement.merged <= 1e-5
    assert same(read_adapter(tmp_path / "out"), grown)
    assert set(grown.lora_ranks.values()) == {1, 2, 3, 4, 5, 6}, "else less was shown than is said"


def test_peft_loads_it_from_its_own_config_file(tiny, grown, tmp_path):
    """Without diffusers, whose settings lie in the weight file: PEFT's come from adapter_config.json."""
    from diffusers import QwenImageTransformer2DModel
    from peft import PeftConfig, inject_adapter_in_model, set_peft_model_state_dict

    write_adapter(tmp_path, grown)
    base = QwenImageTransformer2DModel.from_pretrained(tiny.path / "transformer", torch_dtype=torch.float32)
    model = inject_adapter_in_model(PeftConfig.from_pretrained(str(tmp_path)), base, adapter_name="a")
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = set_peft_model_state_dict(model, tensors, adapter_name="a")
    assert not loaded.unexpected_keys
    adapter_check._check_loaded(model, grown)


@pytest.mark.parametrize("spoilt", ["alpha_pattern", "rank_pattern"])
def test_without_a_pattern_a_grown_adapter_is_not_published(tiny, tmp_path, monkeypatch, spoilt):
    grown = moved_state(tiny, "selora")
    write_adapter(tmp_path / "adapter", grown)
    monkeypatch.setattr(adapter, "find", lambda path, name: grown)
    whole = state_module.peft_settings
    monkeypatch.setattr(state_module, "peft_settings", lambda state: {**whole(state), spoilt: {}})
    # PEFT itself refuses tensors that are not of the rank that it was told.
    with pytest.raises((AdapterError, RuntimeError), match=r"has scale .* there, 8\.0 here|size mismatch"):
        adapter.export(tmp_path / "adapter", tiny.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_grown_adapter_is_merged_by_the_dense_formula(tiny, grown, tmp_path):
    write_adapter(tmp_path / "adapter", grown)
    adapter.merge(tmp_path / "adapter", tiny.path, tmp_path / "merged")
    base = mmdit.build(tiny, torch.float32, None)
    merged = {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            merged |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    for name, tensors in grown.tensors.items():
        expected = base.get_submodule(name).weight.detach().double()
        expected = expected + grown.scale * tensors["lora_B"].double() @ tensors["lora_A"].double()
        if "magnitude" in tensors:
            expected *= (tensors["magnitude"].double() / expected.norm(dim=1))[:, None]
        # Half the spacing of bf16 numbers, and what fp32 is off by before that.
        assert ((merged[f"{name}.weight"].double() - expected).abs() <= expected.abs() * 2**-8 * 1.01 + 1e-6).all()


@pytest.mark.parametrize("average", [False, True])
def test_only_active_ranks_are_taken_from_a_checkpoint(tiny, grown, tmp_path, average):
    run = make_run(tmp_path / "run", tiny, grown, average=average)
    found = adapter.find(run)
    assert found.lora_ranks == grown.lora_ranks
    assert same(found, grown, 0.5 if average else 1)
    write_adapter(tmp_path / "out", found)
    assert same(read_adapter(tmp_path / "out"), found)
    adapter.verify(run, tiny.path)


def test_a_checkpoint_whose_ranks_are_not_those_of_its_tensors_is_refused(tiny, tmp_path):
    grown = moved_state(tiny, "selora")
    run = make_run(tmp_path / "run", tiny, grown, steps=(7,))
    checkpoint = verified(run / "checkpoints" / "step-00000007")
    config = settings_of(RunDirectory(run))
    births = checkpoint.manifest["objective_state"]["growth"]["births"]
    births["transformer_blocks.1.attn.to_q"].pop()
    with pytest.raises(AdapterError, match=r"transformer_blocks\.1\.attn\.to_q has more than its \d active ranks"):
        adapter.adapter_of(checkpoint, config)
    births.pop("transformer_blocks.1.attn.to_q")
    with pytest.raises(AdapterError, match=r"does not tell the active ranks of transformer_blocks\.1\.attn\.to_q"):
        adapter.adapter_of(checkpoint, config)


def test_show_prints_the_rank_of_every_linear(tiny, grown, tmp_path, capsys):
    run = make_run(tmp_path / "run", tiny, grown)
    write_adapter(tmp_path / "adapter", grown)
    ranks = grown.lora_ranks
    heads = sorted({name.split(".", 2)[2] for name in ranks})
    for path in (run / "checkpoints" / "step-00000003", tmp_path / "adapter"):
        assert exit_code(["adapter", "show", str(path)]) == 0
        text = capsys.readouterr().out
        kind = "selora" if grown.settings.kind == "lora" else "se-wdlora"
        assert f"{kind}, rank 1 to 6 ({sum(ranks.values())} in all), scale {grown.scale:g}" in text
        rows = {row.split()[0]: row.split()[1:] for row in text.splitlines() if re.match(r" +\d+( +(\d+|-))+ *$", row)}
        for block in range(4):
            expected = [ranks.get(f"transformer_blocks.{block}.{head}", "-") for head in heads]
            assert rows[str(block)] == [str(rank) for rank in expected]
        total = next(row for row in text.splitlines() if row.startswith("in all")).split()[2:]
        assert sum(map(int, total)) == sum(ranks.values())


def test_each_of_two_adapters_is_found_by_its_name(tiny, pair, dual_run):
    best = BestCheckpoint(3, "checkpoints/step-00000003", "cldice", 0.5, 6, 3).commit(dual_run)
    train_rank.export(RunDirectory(dual_run), settings_of(RunDirectory(dual_run)))
    assert sorted(path.name for path in (dual_run / "adapter").iterdir()) == ["completion", "synthesis"]
    for name, state in pair.items():
        step_3 = dual_run / "checkpoints" / "step-00000003"
        places = {dual_run: 1, dual_run / "adapter": 1, dual_run / "adapter" / name: 1, step_3: 3 / 7, best: 3 / 7}
        for path, factor in places.items():
            found = adapter.find(path, name)
            assert found.facts["adapter_name"] == name
            assert same(found, state, factor), path
        assert same(adapter.find(dual_run / "adapter" / name), state), "this folder holds one alone"
    adapter.verify(dual_run / "adapter", tiny.path, "completion")


def test_a_run_whose_checkpoints_are_gone_has_both_of_its_adapters(tiny, pair, dual_run):
    train_rank.export(RunDirectory(dual_run), settings_of(RunDirectory(dual_run)))
    (dual_run / "checkpoints").rename(dual_run / "elsewhere")
    assert same(adapter.find(dual_run, "completion"), pair["completion"])


@pytest.mark.parametrize("name", [None, "restoration"])
def test_which_of_two_adapters_is_meant_has_to_be_said(dual_run, name):
    train_rank.export(RunDirectory(dual_run), settings_of(RunDirectory(dual_run)))
    told = "none called restoration" if name else "and which of them is meant is not said"
    for path in (dual_run, dual_run / "adapter", dual_run / "checkpoints" / "step-00000003"):
        with pytest.raises(AdapterError) as error:
            adapter.find(path, name)
        assert error.value.message.endswith(f": holds the adapters synthesis and completion, {told}")
        assert error.value.remedy == (
            "name one that it holds: --name synthesis or completion; to `ccmdist synthesize`, --objective synthesis or "
            "completion"
        )


def test_an_adapter_that_was_trained_alone_needs_no_name_and_the_other_is_not_there(tiny, pair, tmp_path):
    alone = {"completion": pair["completion"]}
    overrides = ["objective={kind: dual, adapters: [completion]}", HOLES]
    run = make_run(tmp_path / "run", tiny, alone, overrides=overrides)
    assert same(adapter.find(run), pair["completion"])
    train_rank.export(RunDirectory(run), settings_of(RunDirectory(run)))
    assert same(adapter.find(run / "adapter"), pair["completion"])
    for path in (run, run / "adapter", run / "adapter" / "completion"):
        with pytest.raises(AdapterError, match="holds the adapter completion, none called synthesis; name one that"):
            adapter.find(path, "synthesis")


def test_an_adapter_without_a_name_is_one_that_draws_whole_images(tiny, tmp_path):
    write_adapter(tmp_path, moved_state(tiny, "lora"))
    assert same(adapter.find(tmp_path, "synthesis"), adapter.find(tmp_path))
    with pytest.raises(AdapterError, match="holds the adapter synthesis, none called completion"):
        adapter.find(tmp_path, "completion")


def test_the_command_line_takes_the_name(tiny, pair, dual_run, tmp_path, capsys):
    model = ["--model", str(tiny.path)]
    assert exit_code(["adapter", "show", str(dual_run)]) == 78
    assert "holds the adapters synthesis and completion" in capsys.readouterr().err
    assert exit_code(["adapter", "show", str(dual_run), "--name", "completion"]) == 0
    assert "completion, lora, rank 4, alpha 8" in capsys.readouterr().out
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert exit_code(["adapter", "export", str(dual_run), "--name", "completion", *model, "--out", str(out)]) == 0
    assert same(read_adapter(out), pair["completion"])
    assert (out / CONFIG_FILE).is_file()
    assert exit_code(["adapter", "verify", str(dual_run), "--name", "synthesis", *model]) == 0
    assert exit_code(["adapter", "merge", str(dual_run), "--name", "synthesis", *model, "--out", str(merged)]) == 0
    assert (merged / "config.json").is_file()
