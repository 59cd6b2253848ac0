"""Two adapters on one model: each computes as if it were there alone, and neither knows of the other."""

import pytest
import torch

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.named import inject_named
from ccmdist.adapters.wdlora import initial_down
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.models.quantized import build_quantized

SETTINGS = [WDLoRASettings(lora_rank=3, alpha=6.0), LoRASettings(lora_rank=3)]
NAMES = ("synthesis", "completion")


def base_of(folder, base="fp32"):
    if base == "fp32":
        return mmdit.build(folder, torch.float32, None).requires_grad_(False)
    model = build_quantized(folder, torch.float32, base, torch.device("cpu"), None).requires_grad_(False)
    freeze_linears(model)
    return model


def linears_and(model, settings):
    """What an injection is told: names, settings, squared norms of rows."""
    names = mmdit.linear_names(model, settings.targets)
    return names, settings, row_squares_of(model, names)


def values_of(adapted, seed):
    """Weights of an adapter that has moved: linear of the base -> kind -> values."""
    source = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in adapted.parameters.items():
        linear, kind = name.rsplit(".", 1)
        moved = parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=source)
        found.setdefault(linear, {})[kind] = moved
    return found


def with_both(folder, settings, base="fp32"):
    model = base_of(folder, base)
    named = inject_named(model, *linears_and(model, settings), seed=0, adapters=NAMES)
    states = {name: values_of(adapted, seed) for seed, (name, adapted) in enumerate(named.of.items())}
    for name, adapted in named.of.items():
        adapted.load(states[name])
    return model, named, states


@pytest.mark.parametrize(
    ("settings", "base"),
    [(SETTINGS[0], "fp32"), (SETTINGS[1], "fp32"), (SETTINGS[0], "int8")],
    ids=["wdlora", "lora", "wdlora on int8"],
)
def test_a_model_that_switches_computes_bit_for_bit_what_each_adapter_does_alone(tiny, velocity_of, settings, base):
    model, named, states = with_both(tiny, settings, base)
    assert named.active == "synthesis", "the first is active until another is named"
    alone = {}
    for name in NAMES:
        single = base_of(tiny, base)
        adapted = inject(single, *linears_and(single, settings), seed=1)
        adapted.load({linear.removesuffix(f".{name}"): kinds for linear, kinds in states[name].items()})
        alone[name] = velocity_of(single)
    for name in (*NAMES, *reversed(NAMES), *NAMES):
        named.activate(name)
        assert torch.equal(velocity_of(model), alone[name]), name
    assert (alone["synthesis"] - alone["completion"]).abs().max() > 0.01


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.kind)
def test_untrained_adapters_change_no_bit_and_begin_from_different_directions(tiny, velocity_of, settings):
    model = base_of(tiny)
    expected = velocity_of(model)
    named = inject_named(model, *linears_and(model, settings), seed=4, adapters=NAMES)
    for name in NAMES:
        named.activate(name)
        assert torch.equal(velocity_of(model), expected)
    linear = "transformer_blocks.0.attn.to_q"
    starts = [named.of[name].parameters[f"{linear}.{name}.lora_A"] for name in NAMES]
    assert torch.equal(starts[1], initial_down(3, starts[1].shape[1], f"{linear}.completion", 4))
    assert not torch.equal(*starts)


def test_parameters_are_called_by_linear_and_adapter_and_the_base_is_there_once(tiny):
    model = base_of(tiny)
    num_frozen = sum(parameter.numel() for parameter in model.parameters())
    names, *others = linears_and(model, SETTINGS[0])
    named = inject_named(model, names, *others, seed=0, adapters=NAMES)
    for name in NAMES:
        kinds = ("lora_A", "lora_B", "magnitude")
        assert set(named.of[name].parameters) == {f"{linear}.{name}.{kind}" for linear in names for kind in kinds}
    trained = [p for adapted in named.of.values() for p in adapted.parameters.values()]
    assert num_frozen == sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in trained)
    layer = model.get_submodule(names[0])
    assert layer.synthesis.weight is layer.completion.weight
    assert layer.synthesis.bias is layer.completion.bias


def test_only_the_active_adapter_gets_a_gradient(tiny):
    model, named, _ = with_both(tiny, SETTINGS[0])
    named.activate("completion")
    source = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 1, 4, 64, generator=source)
    prompt = torch.randn(1, 3, 64, generator=source)
    mmdit.velocity(model, latents[0], latents[1], prompt, torch.tensor([0.5]), (2, 2), (2, 2)).square().sum().backward()
    assert all(p.grad is None for p in named.of["synthesis"].parameters.values())
    assert all(p.grad.abs().max() > 0 for p in named.of["completion"].parameters.values())


def test_each_adapter_evaluates_its_norms_anew_when_it_has_changed_and_not_when_the_other_has(tiny, velocity_of):
    model, named, _ = with_both(tiny, SETTINGS[0])
    layer = model.get_submodule("transformer_blocks.0.attn.to_q")

    def states():
        for name in NAMES:
            named.activate(name)
            velocity_of(model)
        return {name: getattr(layer, name).rows for name in NAMES}

    first = states()
    assert states() == first
    named.of["completion"].advance()
    second = states()
    assert second["synthesis"] is first["synthesis"]
    assert second["completion"] is not first["completion"]


def test_an_adapter_that_is_not_there_cannot_become_active(tiny):
    _, named, _ = with_both(tiny, SETTINGS[1])
    with pytest.raises(AssertionError, match=r"^no adapter repair among synthesis, completion$"):
        named.activate("repair")
