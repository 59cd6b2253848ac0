"""Adapters in a whole model: where they sit, what is trained, and what is told of them together."""

import pytest
import torch

from ccmdist.adapters.injection import RowSquares, inject, layer_group, row_squares_of
from ccmdist.adapters.wdlora import initial_down
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.models import mmdit


def adapted(folder, settings, dtype=torch.float32):
    model = mmdit.build(folder, dtype, None).requires_grad_(False)
    names = mmdit.linear_names(model, settings.targets)
    return model, inject(model, names, settings, row_squares_of(model, names), seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_collected_while_reading_are_those_of_the_weights(tiny, dtype):
    names = mmdit.linear_names(mmdit.skeleton(tiny), ("attn", "mlp"))
    collected = RowSquares(names)
    model = mmdit.build(tiny, dtype, None, collected.on_rows)
    expected = row_squares_of(model, names)
    assert collected.reduce().keys() == expected.keys()
    for name, squares in collected.reduce().items():
        assert torch.equal(squares, expected[name]), name


def test_only_adapters_are_trained_and_base_names_stay(tiny):
    plain = mmdit.build(tiny, torch.float32, None)
    model, linears = adapted(tiny, WDLoRASettings(lora_rank=2))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == linears.parameters.keys()
    assert len(linears.parameters) == 3 * 44
    new = model.state_dict().keys() - linears.parameters.keys()
    assert new == plain.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [WDLoRASettings(lora_rank=2), LoRASettings(lora_rank=2)], ids=lambda s: s.kind)
def test_an_untrained_adapter_changes_no_bit_of_the_model(tiny, velocity_of, settings, dtype):
    plain = mmdit.build(tiny, dtype, None)
    model, _ = adapted(tiny, settings, dtype)
    if dtype == torch.bfloat16:
        inputs = torch.randn(1, 8, 64, dtype=dtype), torch.randn(1, 3, 64, dtype=dtype)

        def velocity_of(model):
            halves = inputs[0].split(4, dim=1)
            return mmdit.velocity(model, *halves, inputs[1], torch.tensor([0.5]), (2, 2), (2, 2))

    with torch.no_grad():
        assert torch.equal(velocity_of(model), velocity_of(plain))


def test_the_initial_direction_depends_on_name_and_seed_alone():
    assert torch.equal(initial_down(4, 8, "a", 0), initial_down(4, 8, "a", 0))
    assert not torch.equal(initial_down(4, 8, "a", 0), initial_down(4, 8, "b", 0))
    assert not torch.equal(initial_down(4, 8, "a", 0), initial_down(4, 8, "a", 1))
    assert initial_down(64, 64, "a", 0).abs().max() <= 1 / 8


def test_movement_is_told_per_group_of_layers_and_a_frozen_magnitude_is_noticed(tiny, velocity_of):
    model, linears = adapted(tiny, WDLoRASettings(lora_rank=2))
    assert linears.movement() == {}
    velocity_of(model)
    assert linears.has_frozen_magnitudes()
    assert set(linears.movement().values()) == {0.0}
    with torch.no_grad():
        linears.parameters["transformer_blocks.0.txt_mlp.net.2.magnitude"][0] *= 1.25
    velocity_of(model)
    assert linears.has_frozen_magnitudes(), "the clock has not advanced, so nothing is evaluated"
    linears.advance()
    velocity_of(model)
    assert not linears.has_frozen_magnitudes()
    moved = linears.movement()
    assert moved["magnitude/txt_mlp"] == pytest.approx(0.25 / 128 / 6)
    assert moved["magnitude/img_attn"] == moved["direction_rad/txt_mlp"] == 0


def test_plain_lora_has_no_movement(tiny, velocity_of):
    model, linears = adapted(tiny, LoRASettings(lora_rank=2))
    velocity_of(model)
    assert linears.movement() == {}
    assert not linears.has_frozen_magnitudes()


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer_blocks.0.attn.to_out.0", "img_attn"),
        ("transformer_blocks.0.attn.add_k_proj", "txt_attn"),
        ("transformer_blocks.0.attn.to_add_out", "txt_attn"),
        ("transformer_blocks.10.img_mlp.net.0.proj", "img_mlp"),
        ("transformer_blocks.10.txt_mlp.net.2", "txt_mlp"),
        ("language_model.layers.3.cross_attn.q_proj", "llm_attn"),
        ("language_model.layers.3.mlp.gate_proj", "llm_mlp"),
    ],
)
def test_linears_are_grouped_by_stream_and_kind(name, group):
    assert layer_group(name) == group
