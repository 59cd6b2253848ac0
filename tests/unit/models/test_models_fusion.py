"""Tokens lie as they are said to; a gate of zero and FiLM as it begins change nothing, bit for bit."""

import pytest
import torch

from ccmdist.models.fusion import Film, GatedCrossAttention, LevelTokens, sine_positions


def test_tokens_are_projected_patches_row_by_row():
    torch.manual_seed(0)
    tokens, level = LevelTokens(3, 8, 4, 16), torch.randn(2, 3, 8, 8)
    found = tokens(level) - sine_positions(4, 16) - tokens.level
    for row in range(4):
        for column in range(4):
            patch = level[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten(1)
            torch.testing.assert_close(found[:, 4 * row + column], tokens.project(patch), rtol=0, atol=1e-6)


def test_every_place_has_a_position_of_its_own():
    positions = sine_positions(12, 64)
    assert positions.shape == (144, 64)
    distances = torch.cdist(positions, positions) + torch.eye(144) * 9
    assert distances.min() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_zero_gives_states_back_bit_for_bit_and_alone_gets_a_gradient(dtype):
    torch.manual_seed(0)
    attention = GatedCrossAttention(16, 4)
    states, tokens = torch.randn(2, 5, 16).to(dtype), torch.randn(2, 9, 16, requires_grad=True)
    found, weights = attention(states, tokens)
    assert found.dtype == dtype
    assert torch.equal(found, states)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 5))
    found.float().square().sum().backward()
    moved = {name for name, parameter in attention.named_parameters() if parameter.grad.any()}
    assert moved == {"gate"}
    assert not tokens.grad.any()
    with torch.no_grad():
        attention.gate.fill_(0.1)
    attention(states, tokens)[0].float().square().sum().backward()
    assert all(parameter.grad.any() for parameter in attention.parameters())
    assert tokens.grad.any()


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    attention = GatedCrossAttention(16, 4)
    with torch.no_grad():
        attention.gate.fill_(0.5)
    states, tokens = torch.randn(2, 5, 16), torch.randn(2, 9, 16)
    stock = torch.nn.MultiheadAttention(16, 4, bias=False, batch_first=True)
    with torch.no_grad():
        stock.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key.weight, attention.value.weight]))
        stock.out_proj.weight.copy_(attention.out.weight)
    expected, weights = stock(attention.norm(states), tokens, tokens)
    found = attention(states, tokens)
    torch.testing.assert_close(found[0], states + torch.tanh(torch.tensor(0.5)) * expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], weights, rtol=0, atol=1e-6)


def test_film_changes_nothing_at_first_and_then_scales_and_shifts_channels():
    torch.manual_seed(0)
    film, level, state = Film(16, 3), torch.randn(2, 3, 4, 4), torch.randn(2, 16)
    assert torch.equal(film(level, state), level)
    with torch.no_grad():
        film.project.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 5.0, 0.0]))
    found = film(level, state)
    torch.testing.assert_close(found[:, 0], 2 * level[:, 0])
    torch.testing.assert_close(found[:, 1], level[:, 1] + 5)
    assert torch.equal(found[:, 2], level[:, 2])
