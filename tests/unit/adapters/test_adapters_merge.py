"""Merged weights give what the adapter gives, and an untrained adapter merges to its base."""

from dataclasses import replace

import pytest
import torch

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.merge import merge_into, merged_rows, row_slices
from ccmdist.adapters.state import AdapterState
from ccmdist.config.train import WDLoRASettings
from ccmdist.errors import AdapterError
from ccmdist.models import mmdit
from tests.unit.jobs.made_adapters import moved_state


def test_a_merged_model_predicts_what_the_adapted_one_does(tiny, trained, velocity_of):
    adapted = mmdit.build(tiny, torch.float32, None)
    names = list(trained.tensors)
    inject(adapted, names, trained.settings, row_squares_of(adapted, names), seed=0).load(trained.tensors)
    merged = mmdit.build(tiny, torch.float32, None)
    base = velocity_of(merged)
    merge_into(merged, trained)
    expected, found = velocity_of(adapted), velocity_of(merged)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (base - expected).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_merges_to_the_base_bit_for_bit(tiny, dtype):
    settings = WDLoRASettings(lora_rank=2)
    model = mmdit.build(tiny, dtype, None)
    names = mmdit.linear_names(model, settings.targets)
    linears = inject(model, names, settings, row_squares_of(model, names), seed=0)
    tensors = {
        name: {kind: linears.parameters[f"{name}.{kind}"].detach() for kind in ("lora_A", "lora_B", "magnitude")}
        for name in names
    }
    merged = mmdit.build(tiny, dtype, None)
    before = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    merge_into(merged, AdapterState(settings, tensors, {}))
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merging_into_bf16_rounds_once(trained):
    tensors = next(iter(trained.tensors.values()))
    W = torch.randn(len(tensors["lora_B"]), tensors["lora_A"].shape[1]).bfloat16()
    merged = merged_rows(W, tensors, slice(0, len(W)), trained.scale)
    exact = W.double() + trained.scale * tensors["lora_B"].double() @ tensors["lora_A"].double()
    if "magnitude" in tensors:
        exact *= (tensors["magnitude"].double() / exact.norm(dim=1))[:, None]
    assert merged.dtype == torch.bfloat16
    # Half of the spacing of bf16 numbers is 2^-8 of a value at most; a second rounding would add another.
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 * 1.001).all()


def test_rows_are_all_taken_once():
    assert [index for rows in row_slices(2500) for index in range(2500)[rows]] == list(range(2500))


def test_a_model_that_does_not_fit_is_left_as_it_was(tiny, moved):
    model = mmdit.build(tiny, torch.float32, None)
    before = model.transformer_blocks[0].attn.to_q.weight.detach().clone()
    name = "transformer_blocks.3.attn.to_q"
    misfit = {**moved.tensors, name.replace("3", "4"): moved.tensors[name]}
    with pytest.raises(
        AdapterError, match=r"QwenImageTransformer2DModel: linear transformer_blocks\.4\.attn\.to_q is missing"
    ):
        merge_into(model, replace(moved, tensors=misfit))
    assert torch.equal(model.transformer_blocks[0].attn.to_q.weight, before)


def test_loading_a_grown_adapter_leaves_nothing_of_the_one_before(tiny, velocity_of):
    before, grown = moved_state(tiny, "lora"), moved_state(tiny, "selora")
    names = list(grown.tensors)

    def adapted(*states):
        model = mmdit.build(tiny, torch.float32, None)
        linears = inject(model, names, grown.settings, row_squares_of(model, names), seed=0)
        for state in states:
            linears.load(state.tensors)
        return velocity_of(model)

    assert torch.equal(adapted(before, grown), adapted(grown))
    assert not torch.equal(adapted(before), adapted(grown))
