"""The WDLoRA layer against a dense oracle and against PEFT, its norms, and what is computed how often."""

import copy

import pytest
import torch
from torch import nn

from ccmdist.adapters import wdlora
from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.wdlora import NormClock, RowState, WDLoRALinear, product_with_rows, root
from ccmdist.config.train import WDLoRASettings
from ccmdist.models import mmdit
from ccmdist.models.make import make_transformer
from ccmdist.models.sizes import SIZES


def layer(base, lora_rank=4, scale=0.5, clock=None):
    """An adapted copy of ``base``."""
    dtype = torch.promote_types(base.weight.dtype, torch.float32)
    squares = base.weight.detach().to(dtype).square().sum(1)
    return WDLoRALinear(copy.deepcopy(base), lora_rank, scale, squares, clock or NormClock(), "layer", seed=0)


@torch.no_grad()
def moved(adapted, seed=0):
    """Away from the start, in direction and in magnitude."""
    source = torch.Generator().manual_seed(seed)
    adapted.lora_B.copy_(torch.randn(adapted.lora_B.shape, generator=source, dtype=torch.float64) * 0.3)
    adapted.magnitude.mul_(1 + 0.2 * torch.randn(len(adapted.magnitude), generator=source, dtype=torch.float64))
    adapted.clock.advance()
    return adapted


def dense(x, adapted):
    """W' as the paper writes it, with a detached norm, in fp64; the output and its five leaves."""
    leaves = [t.detach().double().requires_grad_() for t in (x, adapted.lora_A, adapted.lora_B, adapted.magnitude)]
    x64, A, B, m = leaves
    V = adapted.weight.detach().double() + adapted.scale * B @ A
    weight = (m / V.norm(dim=1).detach())[:, None] * V
    bias = None if adapted.bias is None else adapted.bias.detach().double()
    return nn.functional.linear(x64, weight, bias), leaves


def errors(adapted, x, dy):
    """Largest differences of output, dx, dA, dB and dm from the oracle, relative to the largest value."""
    x = x.clone().requires_grad_()
    adapted.zero_grad()
    y = adapted(x)
    y.backward(dy)
    expected, leaves = dense(x, adapted)
    expected.backward(dy.double())
    found = [y.detach(), x.grad, adapted.lora_A.grad, adapted.lora_B.grad, adapted.magnitude.grad]
    wanted = [expected.detach(), *(leaf.grad for leaf in leaves)]
    return [float((f - w).abs().max() / w.abs().max()) for f, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_all_gradients_equal_the_dense_formula_in_fp64(bias):
    torch.manual_seed(0)
    adapted = moved(layer(nn.Linear(24, 40, bias=bias, dtype=torch.float64)))
    x, dy = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 40, dtype=torch.float64)
    assert max(errors(adapted, x, dy)) <= 1e-12


@pytest.mark.parametrize(("num_tokens", "num_values"), [(1, 1), (4, 100), (9, 10**6)])
def test_any_number_of_tokens_at_once_gives_the_same_gradients(num_tokens, num_values, monkeypatch):
    monkeypatch.setattr(wdlora, "TOKENS_AT_ONCE_ON_CPU", num_tokens)
    monkeypatch.setattr(wdlora, "VALUES_IN_CACHE", num_values)
    torch.manual_seed(0)
    adapted = moved(layer(nn.Linear(24, 40, dtype=torch.float64)))
    x, dy = torch.randn(2, 5, 24, dtype=torch.float64), torch.randn(2, 5, 40, dtype=torch.float64)
    assert max(errors(adapted, x, dy)) <= 1e-12


def test_rows_of_small_magnitude_get_the_same_gradient_in_fp64():
    torch.manual_seed(0)
    adapted = moved(layer(nn.Linear(24, 40, dtype=torch.float64)))
    with torch.no_grad():
        adapted.magnitude[[0, 3, 8, 39]] = torch.tensor([0.0, 1e-9, -1e-4, -0.3], dtype=torch.float64)
    adapted.clock.advance()
    x, dy = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, 40, dtype=torch.float64)
    assert max(errors(adapted, x, dy)) <= 1e-12


def test_gradients_beside_a_bf16_base_are_those_of_the_formula():
    torch.manual_seed(0)
    adapted = moved(layer(nn.Linear(96, 64, dtype=torch.bfloat16)))
    x, dy = torch.randn(256, 96, dtype=torch.bfloat16), torch.randn(256, 64, dtype=torch.bfloat16)
    # One rounding to bf16 is 2^-9 of a value.
    assert max(errors(adapted, x, dy)) <= 0.02
    assert adapted.magnitude.grad.dtype == adapted.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_its_base_bit_for_bit(dtype, bias):
    torch.manual_seed(0)
    base = nn.Linear(48, 80, bias=bias, dtype=dtype)
    x = torch.randn(3, 7, 48, dtype=dtype)
    assert torch.equal(layer(base)(x), base(x))


def test_it_agrees_with_the_dora_of_peft_in_fp64():
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    model = nn.ModuleDict({"linear": nn.Linear(24, 40, dtype=torch.float64)})
    adapted = moved(layer(model["linear"]))
    config = LoraConfig(r=4, lora_alpha=2, use_dora=True, target_modules=["linear"])
    theirs = inject_adapter_in_model(config, model, adapter_name="a")["linear"]
    ours = [adapted.lora_A, adapted.lora_B, adapted.magnitude]
    parts = [theirs.lora_A["a"].weight, theirs.lora_B["a"].weight, theirs.lora_magnitude_vector["a"].weight]
    with torch.no_grad():
        for part, our in zip(parts, ours, strict=True):
            part.copy_(our)
    x, dy = torch.randn(6, 24, dtype=torch.float64), torch.randn(6, 40, dtype=torch.float64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_theirs = adapted(x_ours), theirs(x_theirs)
    y_ours.backward(dy)
    y_theirs.backward(dy)
    torch.testing.assert_close(y_ours, y_theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_ours.grad, x_theirs.grad, rtol=1e-12, atol=1e-12)
    for part, our in zip(parts, ours, strict=True):
        torch.testing.assert_close(our.grad, part.grad, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_gives_neither_nan_nor_a_jump():
    torch.manual_seed(0)
    base = nn.Linear(24, 16)
    with torch.no_grad():
        base.weight[3] = 0
    adapted = layer(base)
    x = torch.randn(5, 24)
    assert torch.equal(adapted(x), base(x))
    assert adapted.magnitude[3].item() == pytest.approx(1e-6)
    adapted(x).square().sum().backward()
    for parameter in (adapted.lora_A, adapted.lora_B, adapted.magnitude):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("lora_rank", [16, 64])
@pytest.mark.parametrize("size", [0.002, 0.05, 0.2])
def test_norms_of_a_bf16_base_are_off_by_at_most_2e_5(lora_rank, size):
    torch.manual_seed(0)
    W = (torch.randn(768, 1536) / 1536**0.5).bfloat16()
    A, B = torch.randn(lora_rank, 1536) / 1536**0.5, torch.randn(768, lora_rank)
    B *= size * W.float().norm() / (B @ A).norm()
    squares = W.float().square().sum(1)
    state = RowState.evaluate(W, A, B, squares.sqrt(), squares, 1.0)
    exact = (W.double() + B.double() @ A.double()).norm(dim=1)
    assert float((state.norm / exact - 1).abs().max()) <= 2e-5
    rounded = (W + (B @ A).bfloat16()).norm(dim=1)
    assert float((rounded / exact - 1).abs().max()) > 1e-3, "this test would not see a norm in bf16"


def test_products_do_not_round_what_multiplies_a_bf16_base():
    torch.manual_seed(0)
    W, A = torch.randn(40, 64).bfloat16(), torch.randn(8, 64)
    torch.testing.assert_close(product_with_rows(W, A), W.float() @ A.T, rtol=1e-5, atol=1e-5)


def test_the_floor_of_norms_is_where_it_should_be():
    assert root(torch.tensor([0.0, -1e-20, 4.0])).tolist() == [pytest.approx(1e-6), pytest.approx(1e-6), 2.0]


def tiny_model():
    torch.manual_seed(3)
    model = make_transformer(SIZES["tiny"], "2509").requires_grad_(False)
    names = mmdit.linear_names(model, ("attn", "mlp"))
    adapted = inject(model, names, WDLoRASettings(lora_rank=2), row_squares_of(model, names), seed=0)
    return model.train(), adapted


def train(steps=3, accumulation=4):
    """Train the tiny model with activation recompute; its losses and parameters."""
    model, adapted = tiny_model()
    model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(adapted.parameters.values(), lr=1e-2)
    losses = []
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(accumulation):
            latents = torch.randn(2, 1, 4, 64, generator=source)
            prompt = torch.randn(1, 3, 64, generator=source)
            predicted = mmdit.velocity(model, latents[0], latents[1], prompt, torch.tensor([0.5]), (2, 2), (2, 2))
            loss = predicted.square().mean() / accumulation
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        adapted.advance()
    return losses, {name: parameter.detach() for name, parameter in adapted.parameters.items()}


def test_norms_are_evaluated_once_per_step_and_nothing_changes_by_it(monkeypatch):
    original, calls = RowState.evaluate.__func__, []

    def counted(cls, *arguments):
        calls.append(1)
        return original(cls, *arguments)

    monkeypatch.setattr(RowState, "evaluate", classmethod(counted))
    losses, parameters = train()
    num_linears = sum(name.endswith("magnitude") for name in parameters)
    assert num_linears == 44
    assert len(calls) == 3 * num_linears

    cached = WDLoRALinear.row_state

    def always(self):
        self._count = -1
        return cached(self)

    monkeypatch.setattr(WDLoRALinear, "row_state", always)
    calls.clear()
    again, parameters_again = train()
    assert len(calls) == 2 * 4 * 3 * num_linears, "forward and recompute of every micro-batch"
    assert losses == again
    for name, parameter in parameters.items():
        assert torch.equal(parameter, parameters_again[name]), name
    assert losses[-1] != losses[0]


def test_a_magnitude_in_fp32_moves_where_one_in_bf16_would_not():
    torch.manual_seed(0)
    adapted = layer(nn.Linear(32, 64, dtype=torch.bfloat16))
    start = adapted.magnitude.detach().clone()
    rounded = nn.Parameter(start.bfloat16())
    rounded_start = rounded.detach().clone()
    optimizer = torch.optim.AdamW([adapted.magnitude, rounded], lr=1e-5, weight_decay=0.0)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    for _ in range(20):
        optimizer.zero_grad()
        adapted(x).float().square().sum().backward()
        rounded.grad = adapted.magnitude.grad.bfloat16()
        optimizer.step()
        adapted.clock.advance()
    adapted(x)
    assert float(adapted.rows.movement().share_of_rows) == 1
    assert torch.equal(rounded, rounded_start)


def test_what_validation_has_evaluated_can_be_trained_on():
    torch.manual_seed(0)
    adapted = layer(nn.Linear(16, 8))
    with torch.inference_mode():
        adapted(torch.randn(3, 16))
    assert not adapted.rows.norm.is_inference()
    adapted(torch.randn(3, 16)).sum().backward()
    assert adapted.magnitude.grad.isfinite().all()


def test_backward_reads_the_weight_that_is_there_then():
    """ZeRO-3 takes W away after the forward pass and gathers it anew for the backward pass."""
    torch.manual_seed(0)
    adapted = layer(nn.Linear(16, 8, bias=False))
    x = torch.randn(3, 16, requires_grad=True)
    y = adapted(x)
    gathered_again = 2 * adapted.weight.detach()
    adapted.weight.data = torch.empty(0)
    adapted.weight.data = gathered_again
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones(3, 8) @ gathered_again)


def test_movement_is_told_in_rows_and_radians():
    base = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.eye(2))
    adapted = layer(base, lora_rank=1, scale=1.0)
    with torch.no_grad():
        adapted.lora_A.copy_(torch.tensor([[0.0, 1.0]]))
        adapted.lora_B.copy_(torch.tensor([[1.0], [0.0]]))
        adapted.magnitude.copy_(torch.tensor([1.5, 1.0]))
    moved_by = adapted.row_state().movement()
    assert float(moved_by.magnitude) == pytest.approx(0.25)
    assert float(moved_by.share_of_rows) == 0.5
    assert float(moved_by.angle) == pytest.approx(torch.pi / 8)
