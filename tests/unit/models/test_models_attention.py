"""The attention backend: what is chosen for which machine, that it reaches every block, and what is refused."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from ccmdist.errors import ConfigError
from ccmdist.models import attention, mmdit
from ccmdist.models.attention import Facts, choose, set_backend
from ccmdist.models.model_folder import ModelFolder

H100 = Facts("cuda", torch.bfloat16, 128, has_flash_attn=True, has_pytorch_flash=True)
CPU = torch.device("cpu")


@pytest.fixture
def model(tiny_models):
    return mmdit.build(ModelFolder.open(tiny_models["2509"]), torch.float32, None)


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    monkeypatch.delenv(attention.VARIABLE, raising=False)
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({}, "flash", "flash-attn is installed"),
        ({"dtype": torch.float16}, "flash", "flash-attn is installed"),
        ({"has_flash_attn": False}, "_native_flash", "flash-attn is not installed"),
        ({"head_dim": 288}, "_native_flash", "PyTorch's own"),
        ({"has_flash_attn": False, "has_pytorch_flash": False}, "native", "heads of 128 channels"),
        ({"dtype": torch.float32}, "native", "this is float32"),
        ({"device": "cpu"}, "native", "this is cpu"),
        ({"named": "_native_cudnn"}, "_native_cudnn", "DIFFUSERS_ATTN_BACKEND names it"),
        ({"named": "native", "device": "cpu"}, "native", "names it"),
    ],
)
def test_the_backend_is_the_fastest_that_runs_unless_the_environment_names_one(change, name, reason):
    found = choose(replace(H100, **change))
    assert found.name == name
    assert reason in found.reason


@pytest.mark.parametrize("name", ["flash_varlen", "_flash_varlen_3", "flash_varlen_hub", "sage_varlen"])
def test_backends_of_variable_lengths_are_refused_with_the_reason(name):
    with pytest.raises(ConfigError) as refusal:
        choose(replace(H100, named=name))
    assert str(refusal.value) == (
        f"DIFFUSERS_ATTN_BACKEND={name}: backends of variable lengths are silently wrong where text is padded before "
        "image tokens, and not needed: batches have one text length here; "
        "unset DIFFUSERS_ATTN_BACKEND, or set it to flash, _native_flash or native"
    )


def test_the_backend_is_set_on_every_block_and_told_once(model, caplog):
    with caplog.at_level(logging.INFO):
        found = set_backend(model, CPU, torch.float32)
    assert {block.attn.processor._attention_backend.value for block in model.transformer_blocks} == {"native"}
    assert [record.getMessage() for record in caplog.records] == [f"attention: native ({found.reason})"]


def test_what_the_environment_names_is_set(model, monkeypatch):
    monkeypatch.setenv(attention.VARIABLE, "_native_math")
    assert set_backend(model, CPU, torch.float32).name == "_native_math"
    assert model.transformer_blocks[-1].attn.processor._attention_backend.value == "_native_math"


@pytest.mark.parametrize(("name", "problem"), [("flash", "missing package"), ("flush", "must be one of the following")])
def test_a_named_backend_that_cannot_run_is_refused(model, monkeypatch, name, problem):
    monkeypatch.setenv(attention.VARIABLE, name)
    with pytest.raises(ConfigError, match=rf"^attention backend {name} .*{problem}.*; unset DIFFUSERS_ATTN_BACKEND$"):
        set_backend(model, CPU, torch.float32)


def test_flash_attn_is_asked_of_diffusers_and_only_counts_on_a_gpu(model, monkeypatch):
    monkeypatch.setattr(attention.attention_dispatch, "_CAN_USE_FLASH_ATTN", True)
    assert set_backend(model, CPU, torch.bfloat16).name == "native"


def test_the_search_for_dead_linears_does_not_run_on_the_backend_of_another_model(model):
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.FLASH)  # as `set_attention_backend` does
    assert mmdit.dead_in_last_block(model)
