"""MDF-MLLM begins as the bare language model bit for bit, its gates move first, and what is exported comes back."""

import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import AutoModel

from ccmdist.adapters.state import PEFT_NAMES, write_peft
from ccmdist.ccm.diagnosis_prompts import all_diagnosis_prompts
from ccmdist.config.objectives.mdf_mllm import SegmentSettings
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.make_mllm import make_mllm
from ccmdist.models.mdf_base import base_digest
from ccmdist.models.mllm import Prompts, load_mllm
from ccmdist.models.network_state import NetworkState, make_network, read_network, write_network
from ccmdist.train import mdf_network
from ccmdist.train.llm_adapter import llm_adapter
from ccmdist.train.mdf_network import load_trained, make_mdf_mllm, network_of, refuse_too_large
from tests.small_mdf import CHANNELS, KINDS, make_mllms, small

SIZE_PX = 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mllms(tmp_path_factory):
    make_mllms(folder := tmp_path_factory.mktemp("mllms"))
    return folder


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory):
    """Folder of a U-Net as `segment` leaves it."""
    folder, settings = tmp_path_factory.mktemp("unet"), SegmentSettings(channels=CHANNELS)
    tensors = make_network(settings, SIZE_PX, 7).state_dict()
    write_network(folder, NetworkState.of(settings, SIZE_PX, tensors, {}))
    return folder


def given(mllm, num=2):
    asked = Prompts(mllm, all_diagnosis_prompts(), SIZE_PX).of(all_diagnosis_prompts()[-1])
    images = torch.rand(num, 1, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, asked["prompt_ids"].expand(num, -1), asked["prompt_last"].expand(num)


def loss_of(model, inputs):
    logits, masks, _ = model(*inputs)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 2]))
    return loss if masks is None else loss + masks.square().mean()


@pytest.mark.parametrize("llm_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_while_gates_are_zero_the_language_model_is_the_bare_one_bit_for_bit(mllms, kind, llm_dtype):
    settings, inputs = small(mllms / kind, llm_dtype=llm_dtype, llm="frozen"), given(mllms / kind)
    bare = load_mllm(mllms / kind, mdf_network.DTYPES[llm_dtype]).states(inputs[0], inputs[1])
    model = make_mdf_mllm(settings, SIZE_PX, 0)
    model._tokens = model.fusion.read(model.unet.levels(inputs[0]))
    assert torch.equal(model.mllm.states(inputs[0], inputs[1]), bare)
    assert set(model._attended) == {"1", "2", "3", "4"}
    with torch.no_grad():
        for attention in model.fusion.attention.values():
            attention.gate.fill_(0.5)
    assert not torch.equal(model.mllm.states(inputs[0], inputs[1]), bare)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_move_first_and_then_all_that_is_fused_and_trained(mllms, kind):
    model, inputs = make_mdf_mllm(small(mllms / kind), SIZE_PX, 0), given(mllms / kind)
    trained = {name: p for parameters in model.parameter_sets().values() for name, p in parameters.items()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trained.values()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        still = {name for name, parameter in trained.items() if not parameter.grad.any()}
        fused = {name for name in trained if name.startswith(("fusion.attention", "fusion.tokens"))}
        gates = {name for name in fused if name.endswith("gate")}
        assert not still & gates
        if step == 0:
            assert fused - gates <= still
        else:
            assert not still & fused, step
        optimizer.step()
        model.adapter.advance()
    # Convolutions before an instance norm have biases whose gradient is rounding, or none at all.
    assert not {name for name in still if not name.endswith("conv.bias")}


def test_without_levels_the_model_is_bare_and_has_neither_unet_nor_film(mllms):
    model = make_mdf_mllm(small(mllms / "mllama", fusion_levels=()), SIZE_PX, 0)
    logits, masks, attended = model(*(inputs := given(mllms / "mllama")))
    assert model.unet is None and masks is None and not attended
    assert set(model.parameter_sets()) == {"fusion", "llm"}
    assert set(model.parameter_sets()["fusion"]) == {
        *(f"fusion.{name}" for name in ("norm.weight", "norm.bias", "head.weight", "head.bias"))
    }
    states = load_mllm(mllms / "mllama", torch.float32).states(inputs[0], inputs[1])
    expected = model.fusion.head(model.fusion.norm(states[:, inputs[2][0]]))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("level", [1, 4])
def test_a_level_alone_is_read_and_only_what_has_a_part_in_the_loss_is_trained(mllms, level):
    settings = small(mllms / "qwen2_5_vl", fusion_levels=(level,), mask_weight=0, film=False, llm="frozen")
    model = make_mdf_mllm(settings, SIZE_PX, 0)
    with torch.no_grad():
        model.fusion.attention[str(level)].gate.fill_(0.5)
    logits, masks, attended = model(*given(mllms / "qwen2_5_vl"))
    assert masks is None and set(attended) == {str(level)} and not len(model.fusion.film)
    logits.square().sum().backward()
    sets = model.parameter_sets()
    assert set(sets) == {"fusion", "unet"}
    assert all(p.grad is not None for parameters in sets.values() for p in parameters.values())
    assert ("unet.down_2.convs.conv_0.conv.weight" in sets["unet"]) == (level == 4)
    assert not [name for name in sets["unet"] if "upcat" in name]


def test_film_lets_the_prompt_change_what_the_decoder_finds(mllms):
    model, (images, _, _) = make_mdf_mllm(small(mllms / "mllama", llm="frozen"), SIZE_PX, 0), given(mllms / "mllama")
    texts = all_diagnosis_prompts()
    prompts = Prompts(mllms / "mllama", texts, SIZE_PX)

    def masks(text):
        asked = prompts.of(text)
        return model(images, asked["prompt_ids"].expand(2, -1), asked["prompt_last"].expand(2))[1]

    assert torch.equal(masks(texts[0]), model.unet(images))
    assert torch.equal(masks(texts[0]), masks(texts[-1]))
    with torch.no_grad():
        for film in model.fusion.film.values():
            film.project.weight.fill_(0.01)
    assert not torch.allclose(masks(texts[0]), masks(texts[-1]))


@pytest.mark.parametrize("llm", ["wdlora", "lora", "full", "frozen"])
def test_what_is_exported_comes_back_with_the_same_logits(mllms, segmenting, tmp_path, llm):
    mllm = mllms / "mllama"
    settings, inputs = small(mllm, llm=llm, unet=segmenting), given(mllm)
    model = make_mdf_mllm(settings, SIZE_PX, 3)
    trained = {name: p for parameters in model.parameter_sets().values() for name, p in parameters.items()}
    assert any(name.startswith("llm.") for name in trained) == (llm != "frozen")
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, inputs).backward()
        optimizer.step()
        if model.adapter is not None:
            model.adapter.advance()
    expected = model.eval()(*inputs)[0].detach()
    tensors = {name: parameter.detach().clone() for name, parameter in trained.items()}
    write_network(tmp_path, NetworkState.of(settings, SIZE_PX, tensors, {"base_digest": base_digest(settings)}))
    found = network_of(read_network(tmp_path), CPU)
    assert torch.equal(found(*inputs)[0], expected)
    assert not torch.equal(make_mdf_mllm(settings, SIZE_PX, 3)(*inputs)[0], expected)


def test_a_network_is_the_same_wherever_its_folders_lie_and_another_beside_other_weights(mllms, segmenting, tmp_path):
    """Weights are equal throughout, so that nothing but what they stand beside can make the difference."""

    def digest(mllm, unet):
        settings = small(mllm, unet=unet)
        facts = {"base_digest": base_digest(settings)}
        return NetworkState.of(settings, SIZE_PX, {"fusion.head.bias": torch.zeros(3)}, facts).about.digest

    expected = digest(mllms / "mllama", segmenting)
    moved = shutil.copytree(mllms / "mllama", tmp_path / "elsewhere"), shutil.copytree(segmenting, tmp_path / "unet")
    assert digest(*moved) == expected
    make_mllm("mllama", tmp_path / "other", seed=1)
    assert digest(tmp_path / "other", segmenting) != expected
    assert digest(mllms / "mllama", None) != expected


@pytest.mark.parametrize("llm", ["wdlora", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_the_adapter_of_the_language_model_with_equal_tensors_and_like_states(mllms, tmp_path, kind, llm):
    settings, (images, ids, _) = small(mllms / kind, llm=llm), given(mllms / kind)
    model = make_mdf_mllm(settings, SIZE_PX, 3)
    with torch.no_grad():
        for parameter in model.adapter.parameters.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    model.adapter.advance()
    tensors = {name: p.detach() for parameters in model.parameter_sets().values() for name, p in parameters.items()}
    adapter = llm_adapter(NetworkState.of(settings, SIZE_PX, tensors, {}))
    write_peft(tmp_path, adapter)
    stock = AutoModel.from_pretrained(str(mllms / kind), local_files_only=True, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(stock, str(tmp_path))
    found = get_peft_model_state_dict(loaded)
    assert len(found) == sum(map(len, adapter.tensors.values())) == len(model.adapter.parameters)
    for name, kinds in adapter.tensors.items():
        for part, tensor in kinds.items():
            assert torch.equal(found[f"base_model.model.{name}.{PEFT_NAMES[part]}"], tensor), name
    bare = load_mllm(mllms / kind, torch.float32)
    expected = bare.states(images, ids)
    object.__setattr__(bare, "model", loaded)
    model._tokens = model.fusion.read(model.unet.levels(images))
    torch.testing.assert_close(bare.states(images, ids), model.mllm.states(images, ids), rtol=0, atol=1e-4)
    assert (bare.states(images, ids) - expected).abs().max() > 0.05


def test_without_an_adapter_there_is_none_to_export(mllms):
    assert llm_adapter(NetworkState.of(small(mllms / "mllama", llm="frozen"), SIZE_PX, {}, {})) is None


def test_the_unet_begins_as_segment_left_it(mllms, segmenting):
    found = make_mdf_mllm(small(mllms / "mllama", unet=segmenting), SIZE_PX, 0).unet.state_dict()
    for name, tensor in read_network(segmenting).tensors.items():
        assert torch.equal(found[name], tensor), name


def test_a_language_model_of_which_no_rank_can_hold_its_share_is_not_trained_as_a_whole(mllms, monkeypatch):
    settings = small(mllms / "mllama", llm="full")
    num = sum(parameter.numel() for parameter in load_mllm(settings.mllm, torch.float32).model.parameters())
    monkeypatch.setattr(mdf_network, "MOST_TRAINED", num // 2)
    message = r"full would train 0.0 billion parameters on 1 rank\(s\), 0 GB on each .*; use at least 3 ranks, or set"
    with pytest.raises(ConfigError, match=message):
        refuse_too_large(settings, 1)
    refuse_too_large(settings, 3)
    refuse_too_large(small(mllms / "mllama"), 1)


def test_parts_that_do_not_fit_are_refused(mllms, segmenting, tmp_path):
    mllm = mllms / "mllama"

    def refused(problem, settings):
        with pytest.raises(ModelError, match=problem):
            make_mdf_mllm(settings, SIZE_PX, 0)

    refused(
        r"is a U-Net of channels \[4, 4, 8, 8, 16, 4\], the settings say \[8, 4",
        small(mllm, unet=segmenting, channels=(8, 4, 8, 8, 16, 4)),
    )
    refused("holds no network.json; name the folder `network` of a finished run", small(mllm, unet=tmp_path))
    write_network(tmp_path, NetworkState.of(small(mllm), SIZE_PX, {}, {}))
    refused("is a network of objective.kind diagnose, expected segment", small(mllm, unet=tmp_path))
    refused("fusion_heads: 7 heads do not divide the 64 channels", small(mllm, fusion_heads=7))


def test_a_network_is_refused_beside_another_language_model_or_with_other_parameters(mllms, segmenting):
    settings = small(mllms / "mllama")
    model = make_mdf_mllm(settings, SIZE_PX, 0)
    tensors = {name: p.detach() for parameters in model.parameter_sets().values() for name, p in parameters.items()}
    with pytest.raises(ModelError, match="and the network was trained with 0000"):
        network_of(NetworkState.of(settings, SIZE_PX, tensors, {"base_digest": "0" * 64}), CPU)
    with pytest.raises(ModelError, match="network: is one of segment; name that of"):
        network_of(read_network(segmenting), CPU)
    with pytest.raises(ModelError, match=r"parameter fusion.head.bias is missing"):
        load_trained(model, {name: tensor for name, tensor in tensors.items() if name != "fusion.head.bias"})
    with pytest.raises(ModelError, match=r"fusion.head.bias has shape \(2,\), the model's has \(3,\)"):
        load_trained(model, tensors | {"fusion.head.bias": torch.zeros(2)})
