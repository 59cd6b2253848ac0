"""AdamW in 8 bits: what is stored and taken up again is the same, sets that rest stay as they are, steps are near.

And AdamW where elements count steps of their own: as PyTorch's from their birth on, and not at all before.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.config.train import OptimSettings
from ccmdist.errors import ConfigError
from ccmdist.train.optim import MOMENTS, SetwiseAdamW8bit, optimizer

NUM, STEPS, LR = 1000, 50, 1e-3


def parameters(seed):
    return torch.nn.Parameter(torch.randn(NUM, generator=torch.Generator().manual_seed(seed)))


def made(kind, **sets):
    found = optimizer({name: [parameter] for name, parameter in sets.items()}, OptimSettings(kind=kind, lr=LR))
    for parameter in sets.values():
        found.begin(parameter)
    return found


def trained(kind, num_steps):
    """A parameter and its optimizer after some steps towards zero, with noise that depends on the step alone."""
    parameter = parameters(0)
    found = made(kind, one=parameter)
    for step in range(num_steps):
        noise = torch.randn(NUM, generator=torch.Generator().manual_seed(step))
        parameter.grad = parameter.detach() + noise
        found.step()
    return parameter.detach(), found


@given(seed=st.integers(0, 2**32), exponent=st.integers(-14, 3), sign=st.sampled_from([1, -1]), num=st.integers(1, 700))
@settings(max_examples=50)
def test_moments_that_are_stored_and_taken_up_again_are_the_same_bit_for_bit(seed, exponent, sign, num):
    source = torch.Generator().manual_seed(seed)
    parameter = torch.nn.Parameter(torch.zeros(num))
    found = made("adamw8bit", one=parameter)
    values = torch.randn(num, generator=source) * torch.rand(num, generator=source) ** 8 * 10.0**exponent
    values[0] = sign * 10.0**exponent * 8
    found.set_moments(parameter, {"exp_avg": values, "exp_avg_sq": values.square()})
    once = found.moments(parameter)
    held = {name: tensor.clone() for name, tensor in found.state[parameter].items()}
    found.set_moments(parameter, once)
    assert all(torch.equal(found.state[parameter][name], tensor) for name, tensor in held.items())
    assert once["exp_avg"][0] == values[0], "the largest of a block is kept"


def test_a_run_that_was_stored_in_fp32_goes_on_bit_for_bit():
    expected, _ = trained("adamw8bit", 10)
    parameter, found = trained("adamw8bit", 5)
    again = torch.nn.Parameter(parameter.clone())
    second = made("adamw8bit", one=again)
    second.set_moments(again, found.moments(found.param_groups[0]["params"][0]))
    second.state[again]["step"].fill_(5.0)
    for step in range(5, 10):
        again.grad = again.detach() + torch.randn(NUM, generator=torch.Generator().manual_seed(step))
        second.step()
    assert torch.equal(again.detach(), expected)


def test_steps_in_8_bits_are_near_those_in_32():
    """Measured: 1.7 % of the way that the weights go in 50 steps."""
    start = parameters(0).detach()
    (in_32, _), (in_8, found) = trained("adamw", STEPS), trained("adamw8bit", STEPS)
    assert isinstance(found, SetwiseAdamW8bit)
    assert (in_8 - in_32).norm() <= 0.04 * (in_32 - start).norm()
    assert not torch.equal(in_8, in_32)
    state = found.state[found.param_groups[0]["params"][0]]
    assert sum(tensor.nbytes for name, tensor in state.items() if name != "step") < 2 * NUM * 1.1


def test_a_set_that_rests_stays_bit_for_bit_as_it_is():
    one, other = parameters(1), parameters(2)
    found = made("adamw8bit", one=one, other=other)
    for active in (frozenset({"one", "other"}), frozenset({"one"})):
        one.grad, other.grad = torch.ones(NUM), torch.ones(NUM)
        found.active = active
        held = other.detach().clone(), {name: tensor.clone() for name, tensor in found.state[other].items()}
        moved = one.detach().clone()
        found.step()
        assert not torch.equal(one, moved)
    assert torch.equal(other, held[0])
    assert all(torch.equal(found.state[other][name], tensor) for name, tensor in held[1].items())
    assert set(found.moments(other)) == set(MOMENTS)


def test_8_bits_without_bitsandbytes_are_refused_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it could not be imported
    with pytest.raises(ConfigError, match=r"adamw8bit needs bitsandbytes, .*ccmdist\[quant\].*set optim\.kind=adamw$"):
        made("adamw8bit", one=parameters(0))


def growing(parameter, births, **settings):
    found = optimizer({"one": [parameter]}, OptimSettings(lr=LR, **settings), grows=True)
    found.begin(parameter)
    found.set_births(parameter, births)
    return found


def gradient_of(step):
    return torch.randn(NUM, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 5 - 3)


def pytorchs(start, gradients, betas, weight_decay, lr=LR):
    """Where PyTorch's own AdamW takes a parameter."""
    parameter = torch.nn.Parameter(start.clone())
    theirs = torch.optim.AdamW([parameter], lr=lr, betas=betas, weight_decay=weight_decay)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        theirs.step()
    return parameter.detach()


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.999), (0.0, 0.9)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_where_all_is_there_from_the_start_steps_are_those_of_pytorch(betas, weight_decay, monkeypatch):
    monkeypatch.setattr("ccmdist.train.optim.ELEMENTS_AT_ONCE", 300)  # in parts, as a large adapter
    parameter = parameters(0)
    found = growing(parameter, torch.zeros(NUM, dtype=torch.int32), betas=betas, weight_decay=weight_decay)
    for step in range(STEPS):
        parameter.grad = gradient_of(step)
        found.step()
    expected = pytorchs(parameters(0).detach(), map(gradient_of, range(STEPS)), betas, weight_decay)
    torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-5 * LR)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_element_moves_as_if_the_optimizer_had_started_with_it_and_before_not_at_all(weight_decay):
    birth, betas = 30, (0.9, 0.999)
    births = torch.zeros(NUM, dtype=torch.int32)
    births[::3], births[1::3] = birth, 1 << 30
    parameter, start = parameters(0), parameters(0).detach()
    found = growing(parameter, births, betas=betas, weight_decay=weight_decay)
    for step in range(STEPS):
        parameter.grad = torch.where(births <= step, gradient_of(step), 0)
        found.step()
        if step == birth - 1:
            assert torch.equal(parameter[::3], start[::3])
    assert torch.equal(parameter[1::3], start[1::3]), "never born"
    assert not any(moment[1::3].any() for moment in found.moments(parameter).values())
    expected = pytorchs(start, map(gradient_of, range(birth, STEPS)), betas, weight_decay)
    torch.testing.assert_close(parameter.detach()[::3], expected[::3], rtol=1e-6, atol=1e-5 * LR)
    expected = pytorchs(start, map(gradient_of, range(STEPS)), betas, weight_decay)
    torch.testing.assert_close(parameter.detach()[2::3], expected[2::3], rtol=1e-6, atol=1e-5 * LR)


def test_with_the_steps_of_others_a_first_update_would_be_three_times_too_large():
    """Why elements count for themselves: the update of a new element by PyTorch's AdamW after 1000 steps without."""
    start, gradients = torch.zeros(NUM), [torch.zeros(NUM)] * 1000 + [torch.ones(NUM)]
    late = pytorchs(start, gradients, (0.9, 0.999), 0.0)
    assert late.abs().min() > 2.5 * LR
    parameter = torch.nn.Parameter(start.clone())
    found = growing(parameter, torch.full((NUM,), 1000, dtype=torch.int32), betas=(0.9, 0.999))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        found.step()
    torch.testing.assert_close(parameter.detach(), torch.full((NUM,), -LR), rtol=1e-4, atol=0)


def test_a_set_whose_elements_grow_rests_bit_for_bit_too():
    parameter = parameters(1)
    found = growing(parameter, torch.zeros(NUM, dtype=torch.int32))
    parameter.grad = torch.ones(NUM)
    found.active = frozenset()
    found.step()
    assert torch.equal(parameter, parameters(1))
    assert float(found.state[parameter]["step"]) == 0
