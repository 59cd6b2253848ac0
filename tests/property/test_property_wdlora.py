"""Laws of WDLoRA over all shapes, ranks and weights: its start, the dense formula, merging, and its files."""

import tempfile
from pathlib import Path

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from ccmdist.adapters.merge import merged_rows
from ccmdist.adapters.state import AdapterState, read_adapter, write_adapter
from ccmdist.adapters.wdlora import NormClock, WDLoRALinear
from ccmdist.config.train import LoRASettings, WDLoRASettings

shapes = st.tuples(st.integers(1, 33), st.integers(1, 33), st.integers(1, 9))
cases = st.tuples(shapes, st.booleans(), st.integers(0, 2**31), st.floats(1e-3, 8))
CANCELLING = ((1, 28, 5), True, 115444086, 3.9296875)
"""A row of one weight, of which the update leaves next to nothing."""


def build(case, dtype):
    """An adapted linear of some shape, with weights of some size, and its base."""
    (num_in, num_out, lora_rank), bias, seed, size = case
    torch.manual_seed(seed)
    base = nn.Linear(num_in, num_out, bias=bias, dtype=dtype)
    with torch.no_grad():
        base.weight.mul_(size)
        base.weight[torch.rand(num_out) < 0.1] = 0
    squares = base.weight.detach().to(torch.promote_types(dtype, torch.float32)).square().sum(1)
    return base, WDLoRALinear(base, lora_rank, 0.75, squares, NormClock(), "layer", seed)


@torch.no_grad()
def move(adapted):
    adapted.lora_B.normal_(std=0.5)
    adapted.magnitude.add_(torch.randn_like(adapted.magnitude), alpha=0.5)
    adapted.clock.advance()


@torch.no_grad()
def bound(base, adapted):
    """What rounding may do to an output or gradient, relative: 1e-12 for usual weights.

    A norm by its parts loses digits where a row of W and its update cancel: as many as the squares of both are larger
    than the square of the sum. In layers of one input they cancel to any degree.
    """
    update = adapted.scale * adapted.lora_B @ adapted.lora_A
    squares = base.weight.square().sum(1) + update.square().sum(1)
    return 1e-12 * float((squares / (base.weight + update).square().sum(1).clamp_min(1e-12)).max().clamp_min(1))


@given(case=cases, dtype=st.sampled_from([torch.float32, torch.bfloat16]), num_tokens=st.integers(0, 9))
@settings(max_examples=30)
def test_every_layer_starts_as_its_base_bit_for_bit(case, dtype, num_tokens):
    base, adapted = build(case, dtype)
    x = torch.randn(num_tokens, base.in_features, dtype=dtype)
    assert torch.equal(adapted(x), base(x))


@given(case=cases)
@example(case=CANCELLING)
@settings(max_examples=30)
def test_output_and_gradients_are_those_of_the_dense_formula(case):
    base, adapted = build(case, torch.float64)
    move(adapted)
    x = torch.randn(4, base.in_features, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, base.out_features, dtype=torch.float64)
    y = adapted(x)
    y.backward(dy)
    leaves = [t.detach().clone().requires_grad_() for t in (x, adapted.lora_A, adapted.lora_B, adapted.magnitude)]
    x64, A, B, m = leaves
    V = base.weight.detach() + adapted.scale * B @ A
    weight = (m / V.norm(dim=1).detach().clamp_min(1e-6))[:, None] * V
    expected = nn.functional.linear(x64, weight, None if base.bias is None else base.bias.detach())
    expected.backward(dy)
    found = [y, x.grad, adapted.lora_A.grad, adapted.lora_B.grad, adapted.magnitude.grad]
    for part, wanted in zip(found, [expected, *(leaf.grad for leaf in leaves)], strict=True):
        assert (part - wanted).abs().max() <= bound(base, adapted) * wanted.abs().max()


@given(case=cases)
@example(case=CANCELLING)
@settings(max_examples=30)
def test_merging_changes_no_output(case):
    base, adapted = build(case, torch.float64)
    move(adapted)
    tensors = {kind: getattr(adapted, kind).detach() for kind in ("lora_A", "lora_B", "magnitude")}
    merged = merged_rows(base.weight.detach(), tensors, slice(0, base.out_features), adapted.scale)
    x = torch.randn(4, base.in_features, dtype=torch.float64)
    expected = adapted(x).detach()
    found = nn.functional.linear(x, merged, None if base.bias is None else base.bias.detach())
    assert (found - expected).abs().max() <= bound(base, adapted) * expected.abs().max()


kinds = st.sampled_from([WDLoRASettings, LoRASettings])
names = st.lists(
    st.builds(
        "transformer_blocks.{}.{}".format, st.integers(0, 60), st.sampled_from(["attn.to_q", "img_mlp.net.0.proj"])
    ),
    min_size=1,
    max_size=5,
    unique=True,
)


@given(
    kind=kinds,
    names=names,
    shape=shapes,
    alpha=st.none() | st.floats(1e-3, 1e3),
    facts=st.dictionaries(st.text(), st.text()),
)
@settings(max_examples=15)
def test_every_adapter_is_read_as_it_was_written(kind, names, shape, alpha, facts):
    num_in, num_out, lora_rank = shape
    tensors = {
        name: {"lora_A": torch.randn(lora_rank, num_in), "lora_B": torch.randn(num_out, lora_rank)} for name in names
    }
    if kind is WDLoRASettings:
        for one in tensors.values():
            one["magnitude"] = torch.randn(num_out)
    state = AdapterState(kind(lora_rank=lora_rank, alpha=alpha), tensors, facts)
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), state)
        found = read_adapter(Path(folder))
    assert (found.settings, found.facts) == (state.settings, facts)
    assert found.tensors.keys() == tensors.keys()
    for name, one in tensors.items():
        assert all(torch.equal(tensor, found.tensors[name][kind_]) for kind_, tensor in one.items())
