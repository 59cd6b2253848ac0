"""Linears held in 4 or 8 bits beneath an adapter compute with their dense weights, forward and backward."""

import sys

import pytest
import torch
from torch import nn

from ccmdist.adapters.frozen import FrozenLinear, freeze_linears
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.errors import ModelError
from ccmdist.models import mmdit, quantized
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.quantized import FORMS, NF4Weight, build_quantized
from ccmdist.models.tabulation import table_for

WIDTH, HEIGHT, TOKENS = 192, 128, 5
ERRORS = {"nf4": 0.12, "int8": 0.01}
"""Of the norm of the whole weight, at most; measured on normal weights: 0.093 and 0.0070."""


def linear(dtype):
    torch.manual_seed(0)
    return nn.Linear(WIDTH, HEIGHT, dtype=dtype).requires_grad_(False)


def holding(form, dtype):
    """A linear in ``form``, and a dense one with the weights that it computes with."""
    held, dense = linear(dtype), linear(dtype)
    weight = FORMS[form](held.weight.data, "cpu")
    del held.weight
    held.weight = weight
    dense.weight.data.copy_(weight.dense())
    return nn.ModuleDict({"layer": held}), nn.ModuleDict({"layer": dense})


def outputs(model, settings, move):
    """Output and gradients of an adapted layer."""
    adapted = inject(model, ["layer"], settings, row_squares_of(model, ["layer"]), seed=0)
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters.values():
            parameter.add_(move * torch.randn(parameter.shape, generator=source))
    dtype = model["layer"].weight.dtype
    x = torch.randn(TOKENS, WIDTH, generator=source).to(dtype).requires_grad_()
    y = model["layer"](x)
    y.backward(torch.randn(y.shape, generator=source).to(dtype))
    return [y, x.grad, *(parameter.grad for parameter in adapted.parameters.values())]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [WDLoRASettings(lora_rank=4), LoRASettings(lora_rank=4)], ids=lambda s: s.kind)
def test_an_adapter_on_quantized_weights_is_that_on_their_dense_ones(form, dtype, settings):
    held, dense = holding(form, dtype)
    for found, expected in zip(outputs(held, settings, 0.01), outputs(dense, settings, 0.01), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_an_untrained_adapter_is_the_quantized_layer_bit_for_bit(form):
    held, dense = holding(form, torch.bfloat16)
    freeze_linears(held)
    assert isinstance(held["layer"], FrozenLinear)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    expected = held["layer"](x)
    assert torch.equal(expected, dense["layer"](x))
    inject(held, ["layer"], WDLoRASettings(lora_rank=4), row_squares_of(held, ["layer"]), seed=0)
    assert torch.equal(held["layer"](x), expected)


@pytest.mark.parametrize("form", FORMS)
def test_quantized_weights_are_near_and_small(form):
    weight = torch.randn(HEIGHT, WIDTH, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    held = FORMS[form](weight, "cpu")
    error = (held.dense().float() - weight.float()).norm() / weight.float().norm()
    assert error <= ERRORS[form]
    assert not held.dense()[3].any()
    assert held.codes.nbytes == weight.numel() // {"nf4": 2, "int8": 1}[form]


def test_nf4_without_bitsandbytes_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it could not be imported
    with pytest.raises(ModelError, match=r"base: nf4 needs bitsandbytes, .*; run `pip install \"ccmdist\[quant\]\"`"):
        NF4Weight(torch.ones(2, 2), "cpu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_with_table", [False, True])
def test_a_model_quantized_while_it_is_read_is_that_of_the_folder(form, is_with_table, tiny_models):
    folder, dtype = ModelFolder.open(tiny_models["2511"]), torch.bfloat16
    sigmas = torch.tensor([0.5])
    table = table_for(folder, sigmas, dtype, 1, torch.device("cpu"), "base") if is_with_table else None
    whole, held = mmdit.build(folder, dtype, None, table=table), build_quantized(folder, dtype, form, "cpu", table)
    expected = dict(whole.named_parameters())
    assert not any(parameter.is_meta for parameter in held.parameters())
    for name, linear in held.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("transformer_blocks."):
            weight = FORMS[form](expected.pop(f"{name}.weight").data, "cpu")
            assert torch.equal(linear.weight.dense(), weight.dense())
    found = dict(held.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_of_a_model_that_is_quantized_host_memory_holds_a_block(tiny_models, monkeypatch):
    folder, blocks = ModelFolder.open(tiny_models["2509"]), []

    def noted(block, form, device):
        dense = [linear for linear in models[0].transformer_blocks.modules() if isinstance(linear, nn.Linear)]
        blocks.append(sum(isinstance(linear.weight, nn.Parameter) and not linear.weight.is_meta for linear in dense))
        original(block, form, device)

    original, models = quantized._hold_quantized, []
    monkeypatch.setattr(quantized, "skeleton", lambda folder: models.append(mmdit.skeleton(folder)) or models[-1])
    monkeypatch.setattr(quantized, "_hold_quantized", noted)
    build_quantized(folder, torch.bfloat16, "int8", "cpu", None)
    assert blocks == [blocks[0]] * len(models[0].transformer_blocks)


def test_weights_that_belong_nowhere_are_refused(tiny_models, monkeypatch):
    folder, original = ModelFolder.open(tiny_models["2509"]), quantized.weight_files
    monkeypatch.setattr(quantized, "weight_files", lambda *a: original(*a) | {"foreign.weight": folder.path})
    with pytest.raises(ModelError, match=r"do not fit Qwen.*: unexpected foreign\.weight; use config"):
        build_quantized(folder, torch.bfloat16, "int8", "cpu", None)
