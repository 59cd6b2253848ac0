"""The base in 4 bits: what it changes, who decides for it, and who is refused."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from files_of_sets import images_of
from torch import nn

from ccmdist.cli import exit_code
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from ccmdist.errors import ConfigError, ModelError, RunError
from ccmdist.jobs.synthesize import describe
from ccmdist.models import mmdit, quantized
from ccmdist.models.backbones.qwen import Qwen
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import is_tabled
from ccmdist.models.sizes import SIZES
from ccmdist.synthesis import base as base_module
from ccmdist.synthesis.base import HEADROOM_BYTES, base_for_card, load, noise_levels
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import read_plan
from ccmdist.synthesis.verify import verify_against_plan

GIB = 1 << 30


def velocity_of(model, dtype, sigmas):
    random = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=random).to(dtype)

    with torch.no_grad():
        inputs = (noise(2, 16, 64), noise(2, 16, 64), noise(2, 9, 64), sigmas[:2])
        return mmdit.velocity(model, *inputs, (4, 4), (4, 4)).float()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_in_nf4_the_velocity_differs_by_a_few_per_cent(dtype, sources, config, plan_of):
    model = ModelFolder.open(sources / "model")
    settings = replace(plan_of(config()).settings, dtype=dtype, base=dtype)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    as_it_is = load(model, settings, None, torch.device("cpu"))
    sigmas = noise_levels(model, settings)
    expected = velocity_of(as_it_is, torch_dtype, sigmas)
    in_nf4 = load(model, replace(settings, base="nf4"), None, torch.device("cpu"))
    found = velocity_of(in_nf4, torch_dtype, sigmas)
    deviation = float((found - expected).norm() / expected.norm())
    assert 0.02 < deviation < 0.1, deviation  # 0.054 in both
    linears = [module for module in in_nf4.transformer_blocks.modules() if type(module).__name__ == "Linear4bit"]
    in_blocks = {n for n, module in as_it_is.named_modules() if isinstance(module, nn.Linear) and "_blocks" in n}
    assert len(linears) == len([name for name in in_blocks if not is_tabled(name)]) == 12 * 4
    assert {linear.weight.dtype for linear in linears} == {torch.uint8}
    # What is small and sensitive stays as it is: embeddings, norms, the projections in and out.
    assert in_nf4.proj_out.weight.dtype == torch_dtype
    kept = sum(weight.numel() * weight.itemsize for weight in in_nf4.parameters())
    assert kept < quantized.num_bytes(model, torch_dtype, in_nf4=True, has_modulation=False) < 1.1 * kept
    has_modulation = dtype == "fp32"
    whole = sum(weight.nbytes for weight in as_it_is.parameters())
    assert quantized.num_bytes(model, torch_dtype, False, has_modulation) == whole


def test_the_adapter_is_merged_before_anything_is_rounded(sources, config, plan_of, monkeypatch):
    seen = []
    monkeypatch.setattr(base_module, "merge_into", lambda model, state: seen.append(type(first_linear(model)).__name__))
    settings = replace(plan_of(config()).settings, base="nf4")
    nothing = SimpleNamespace(tensors={})
    model = load(ModelFolder.open(sources / "model"), settings, nothing, torch.device("cpu"))
    assert (*seen, type(first_linear(model)).__name__) == ("Linear", "Linear4bit")


def test_in_bf16_images_are_the_same_bytes_with_and_without_a_table(config, monkeypatch, tmp_path, cache_in_bf16):
    cache = f"data.cache={cache_in_bf16}"
    built, original = [], mmdit.build
    monkeypatch.setattr(mmdit, "build", lambda *a, **b: built.append(original(*a, **b)) or built[-1])
    in_bf16 = ("base=bf16", "data.dtype=bf16", cache)
    assert synthesize(config(*in_bf16, "data.stage_model=true"), None)
    monkeypatch.setattr(base_module, "is_tabulated", lambda base, adapter: False)
    assert synthesize(config(*in_bf16, out="plain"), None)
    has_modulation = [any(is_tabled(name) for name, _ in model.named_parameters()) for model in built]
    assert has_modulation == [False, True]
    tabled, plain = images_of(tmp_path / "out"), images_of(tmp_path / "plain")
    assert len(tabled) == 10
    assert all(np.array_equal(image, tabled[key]) for key, image in plain.items())
    assert read_plan(tmp_path / "out").digest == read_plan(tmp_path / "plain").digest


@pytest.mark.parametrize(
    ("base", "targets", "expected"),
    [
        ("bf16", "attn.to_q", True),
        ("nf4", "attn.to_q", True),
        ("fp32", "attn.to_q", False),
        ("bf16", "img_mod.1", False),
    ],
)
def test_layers_that_an_adapter_changes_are_not_tabulated_and_fp32_is_left_to_the_bit(base, targets, expected):
    adapter = SimpleNamespace(tensors={f"transformer_blocks.0.{targets}": {}})
    assert base_module.is_tabulated(base, adapter) == expected


def first_linear(model):
    return model.transformer_blocks[0].attn.to_q


def test_a_set_in_nf4_is_another_set_and_says_so(config, drawn, tmp_path):
    assert synthesize(config("base=nf4"), None)
    assert verify_against_plan(tmp_path / "out")
    assert read_plan(tmp_path / "out").digest != read_plan(drawn).digest
    assert read_manifest(tmp_path / "out").about["base"] == "nf4"
    assert {triple.meta.provenance["base"] for triple in read_split(tmp_path / "out", "test")} == {"nf4"}
    found, expected = images_of(tmp_path / "out"), images_of(drawn)
    differences = [np.abs(image.astype(int) - found[key]) for key, image in expected.items()]
    assert all(difference.any() for difference in differences)
    assert np.mean(differences) < 3  # grey levels; 1.0 here
    with pytest.raises(RunError, match=r"begun with other settings:\n  base: fp32 -> nf4\n"):
        synthesize(config("base=nf4").model_copy(update={"out": drawn}), None)


def card(monkeypatch, num_gib, name="NVIDIA A40"):
    """Pretend that this process has a card, for what asks for its memory."""
    properties = SimpleNamespace(total_memory=round(num_gib * GIB), name=name)
    cuda = SimpleNamespace(current_device=lambda: 0, get_device_properties=lambda device: properties)
    monkeypatch.setattr(base_module, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(base_module, "is_gpu_usable", lambda: True)


@pytest.fixture
def small(sources):
    """GiB of a card that holds the tiny base in nf4, but not in fp32."""
    model = ModelFolder.open(sources / "model")
    sizes = [quantized.num_bytes(model, torch.float32, in_nf4) for in_nf4 in (True, False)]
    return (HEADROOM_BYTES + sum(sizes) / 2) / GIB


@pytest.fixture
def full(monkeypatch):
    """The 20 B model, by its size alone."""
    structure = mmdit.QwenImageTransformer2DModel
    with torch.device("meta"):
        model = structure(**SIZES["full"].transformer)
    monkeypatch.setattr(Qwen, "skeleton", lambda backbone: model)


@pytest.mark.parametrize(
    ("num_gib", "dtype", "expected"),
    [
        (79.1, "bf16", "bf16"),
        (44.4, "bf16", "bf16"),
        (39.4, "bf16", "bf16"),
        (29.0, "bf16", "nf4"),
        (23.6, "bf16", "nf4"),
        (79.1, "fp32", "nf4"),
        (139.8, "fp32", "fp32"),
    ],
)
def test_a_card_that_cannot_hold_the_20_b_base_in_bf16_takes_nf4(num_gib, dtype, expected, sources, full, monkeypatch):
    model = ModelFolder.open(sources / "model")
    assert base_for_card(model, dtype) == dtype, "a CPU takes the base as it is"
    card(monkeypatch, num_gib)
    assert base_for_card(model, dtype) == expected


def test_a_table_takes_a_third_off_the_20_b_base_of_38_gib_in_bf16_and_10_in_nf4(sources, full):
    model = ModelFolder.open(sources / "model")
    tabled = quantized.num_bytes(model, torch.bfloat16, False, has_modulation=False)
    assert tabled / GIB == pytest.approx(25.38, abs=0.02)
    assert quantized.num_bytes(model, torch.bfloat16, True, has_modulation=False) / GIB == pytest.approx(6.6, abs=0.1)
    assert quantized.num_bytes(model, torch.bfloat16, in_nf4=False) / GIB == pytest.approx(38.05, abs=0.02)
    assert quantized.num_bytes(model, torch.bfloat16, in_nf4=True) / GIB == pytest.approx(9.9, abs=0.2)
    assert HEADROOM_BYTES == 4 * GIB


def test_whoever_begins_the_set_decides_and_the_others_keep_to_it(config, remembered, small, monkeypatch, tmp_path):
    card(monkeypatch, small)
    synthesize(config(), None)
    assert read_plan(tmp_path / "out").settings.base == "nf4"
    card(monkeypatch, 80)
    synthesize(config(), None)
    assert read_plan(tmp_path / "out").settings.base == "nf4"
    assert "base in nf4" in describe(config())
    assert "base in the form that the card of the first worker decides" in describe(config(out="new"))


def test_a_set_that_another_card_has_begun_meanwhile_is_kept_to(config, remembered, small, monkeypatch, tmp_path):
    accept = SyntheticSet.accept
    others = [80, small]

    def overtaken(self):
        if len(others) == 2:
            card(monkeypatch, others.pop())
            synthesize(config(), None)
            card(monkeypatch, others.pop())
        accept(self)

    monkeypatch.setattr(SyntheticSet, "accept", overtaken)
    card(monkeypatch, 80)
    assert synthesize(config(), None)
    assert read_plan(tmp_path / "out").settings.base == "nf4"


def test_a_card_that_cannot_hold_the_base_of_the_set_is_refused_with_the_sizes(
    config, full, monkeypatch, tmp_path, cache_in_bf16
):
    card(monkeypatch, 23.6, "NVIDIA L4")
    with pytest.raises(RunError) as refusal:
        synthesize(config("base=bf16", "data.dtype=bf16", f"data.cache={cache_in_bf16}"), None)
    assert str(refusal.value) == (
        f"{tmp_path}/out: the base in bf16 has 25.4 GiB and needs 4.0 GiB beside it, NVIDIA L4 has 23.6 GiB; "
        "run it on cards with more memory, or draw another set, in another out, with base=nf4"
    )
    assert not (tmp_path / "out").exists()
    card(monkeypatch, 7.4, "NVIDIA P4")
    with pytest.raises(
        RunError, match=r"the base in nf4 has \d+\.\d GiB .* has 7\.4 GiB; run it on cards with more memory$"
    ):
        synthesize(config("base=nf4"), None)


def test_without_bitsandbytes_nf4_is_refused_with_the_command_that_installs_it(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModelError, match=r"base: nf4 needs bitsandbytes, .*; run `pip install \"ccmdist\[quant\]\"`"):
        synthesize(config("base=nf4"), None)


def test_bf16_is_refused_where_the_run_is_in_fp32(config, capsys):
    with pytest.raises(ConfigError, match=r"base: bf16, but data.dtype is fp32; set base=auto, or data.dtype=bf16"):
        config("base=bf16")
    assert exit_code(["synthesize", "out=x", "data.shards=s", "data.model=m", "data.dtype=fp32", "base=bf16"]) == 78
    assert "set base=auto" in capsys.readouterr().err
