"""The flow's formulas against diffusers' scheduler and pipeline, and against hand-made cases."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_shift
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.diffusion import flow
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.sizes import NOISE_SCHEDULE

SCHEDULES = {
    "published": NOISE_SCHEDULE,
    "without a terminal level": NOISE_SCHEDULE | {"shift_terminal": None},
    "with a fixed shift": NOISE_SCHEDULE | {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
}


def stock_sigmas(num_denoise_steps, num_tokens, noise_schedule):
    """What the pipelines make of the scheduler's config."""
    scheduler = FlowMatchEulerDiscreteScheduler(**noise_schedule)
    config = scheduler.config
    anchors = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
    mu = calculate_shift(num_tokens, *anchors)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / num_denoise_steps, num_denoise_steps), mu=mu)
    return scheduler.sigmas


@pytest.mark.parametrize("noise_schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("image_size_px", [64, 384, 1024])
@pytest.mark.parametrize("num_denoise_steps", [2, 3, 12, 40, 100])
def test_the_levels_of_the_sampler_are_those_of_diffusers(num_denoise_steps, image_size_px, noise_schedule):
    num_tokens = (image_size_px // 16) ** 2
    mu = flow.resolution_shift(num_tokens, noise_schedule)
    found = flow.sampling_sigmas(num_denoise_steps, mu, noise_schedule)
    expected = stock_sigmas(num_denoise_steps, num_tokens, noise_schedule)
    assert found.shape == (num_denoise_steps + 1,)
    # diffusers computes in float32, ours in float64 before one rounding.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_shift_at_384_px_is_the_published_one():
    assert math.exp(flow.resolution_shift(24 * 24, NOISE_SCHEDULE)) == pytest.approx(1.68, abs=0.005)


def test_the_grid_of_training_is_that_of_the_scheduler():
    num_tokens = 24 * 24
    expected = stock_sigmas(1000, num_tokens, NOISE_SCHEDULE | {"shift_terminal": None})[:-1]
    found = flow.training_sigmas(flow.resolution_shift(num_tokens, NOISE_SCHEDULE))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.all(found.diff() < 0)


@pytest.mark.parametrize("num_denoise_steps", [1, 0])
def test_less_than_two_steps_are_refused(num_denoise_steps):
    with pytest.raises(ConfigError, match=r"^denoise_steps: \d is too few; use at least 2$"):
        flow.sampling_sigmas(num_denoise_steps, 0.5, NOISE_SCHEDULE)


@pytest.mark.parametrize(
    "option", [{"use_karras_sigmas": True}, {"invert_sigmas": True}, {"time_shift_type": "linear"}]
)
def test_a_schedule_of_another_kind_is_refused(option):
    ((name, value),) = option.items()
    with pytest.raises(ModelError, match=rf"{name} {value!r} is not supported, expected"):
        flow.resolution_shift(576, NOISE_SCHEDULE | option)


@given(batch=st.integers(1, 3), channels=st.integers(1, 17), rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_unpacking_is_the_inverse_of_packing(batch, channels, rows, columns):
    latents_BChw = torch.randn(batch, channels, 2 * rows, 2 * columns)
    tokens_BSC = flow.pack_latents(latents_BChw)
    assert tokens_BSC.shape == (batch, rows * columns, 4 * channels)
    assert torch.equal(flow.unpack_latents(tokens_BSC, 2 * rows, 2 * columns), latents_BChw)


@pytest.mark.parametrize("hw", [(8, 8), (6, 10)])
def test_packing_is_that_of_the_stock_pipeline(hw):
    latents_BChw = torch.randn(2, 16, *hw)
    expected = QwenImageEditPlusPipeline._pack_latents(latents_BChw.unsqueeze(1), 2, 16, *hw)
    assert torch.equal(flow.pack_latents(latents_BChw), expected)
    unpacked = QwenImageEditPlusPipeline._unpack_latents(expected, 8 * hw[0], 8 * hw[1], 8).squeeze(2)
    assert torch.equal(flow.unpack_latents(expected, *hw), unpacked)


def test_at_level_0_there_is_the_image_and_at_level_1_the_noise():
    x, noise = torch.randn(2, 3, 4, 8)
    x, noise = x.unsqueeze(0), noise.unsqueeze(0)
    assert torch.equal(flow.interpolate(x[0], noise[0], torch.zeros(3)), x[0])
    assert torch.equal(flow.interpolate(x[0], noise[0], torch.ones(3)), noise[0])


def test_the_target_is_the_derivative_by_the_noise_level():
    x, noise = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    low, high = (flow.interpolate(x, noise, torch.full((3,), sigma, dtype=torch.float64)) for sigma in (0.4, 0.6))
    torch.testing.assert_close((high - low) / 0.2, flow.velocity_target(x, noise), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_levels_of_training_are_drawn_from_the_grid(kind):
    grid, source = flow.training_sigmas(0.5), torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.draw_sigma(kind, grid, source) for _ in range(4000)])
    assert torch.isin(drawn, grid).all()
    # The median place is the middle of the grid for both kinds; 4000 draws place it to about 1 % of the grid.
    assert drawn.median() == pytest.approx(float(grid[500]), abs=0.02)
    spread = (drawn - grid[500]).abs().mean()
    assert (spread > 0.2) == (kind == "uniform")


def test_an_unknown_way_to_draw_levels_is_refused():
    with pytest.raises(ConfigError, match="sigma_sampling: 'cosmap' is not known"):
        flow.draw_sigma("cosmap", flow.training_sigmas(0.5), torch.Generator())


def test_a_level_is_snapped_to_the_nearest_of_the_grid():
    grid = torch.tensor([1.0, 0.6, 0.5, 0.1])
    assert [float(flow.nearest_on_grid(sigma, grid)) for sigma in (0.9, 0.56, 0.0)] == pytest.approx([1.0, 0.6, 0.1])


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_levels_are_drawn_as_often_as_is_said(kind):
    grid, source, num_draws = flow.training_sigmas(0.5), torch.Generator().manual_seed(0), 20_000
    shares = flow.sigma_shares(kind, grid)
    assert float(shares.sum()) == pytest.approx(1, abs=1e-12)
    drawn = torch.stack([flow.draw_sigma(kind, grid, source) for _ in range(num_draws)])
    found = torch.stack([(drawn == level).sum() for level in grid]).view(10, 100).sum(1) / num_draws
    # Of tenths of the grid; a share of 20 000 draws has a standard deviation of 0.003 at most.
    torch.testing.assert_close(found.double(), shares.view(10, 100).sum(1), rtol=0, atol=0.012)


@given(sigma=st.floats(1e-3, 1 - 1e-3), gamma=st.floats(0.1, 50))
def test_weights_of_the_velocity_are_those_of_min_snr_by_its_definition(sigma, gamma):
    """Against the weighted error of the image that each of two velocities implies."""
    source = torch.Generator().manual_seed(0)
    x, noise, error = torch.randn(3, 1, 4, 8, generator=source, dtype=torch.float64)
    level = torch.tensor([sigma], dtype=torch.float64)
    noisy, target = flow.interpolate(x, noise, level), flow.velocity_target(x, noise)
    implied = noisy - sigma * (target + error)
    snr = (1 - sigma) ** 2 / sigma**2
    by_definition = min(snr, gamma) * (implied - x).square().mean()
    found = flow.min_snr_weights(level, gamma) * error.square().mean()
    torch.testing.assert_close(found.squeeze(), by_definition, rtol=1e-9, atol=1e-12)


def test_the_weight_is_largest_where_the_signal_to_noise_ratio_meets_its_bound():
    grid = flow.training_sigmas(0.0)
    weights = flow.min_snr_weights(grid, 4.0)
    assert float(grid[weights.argmax()]) == pytest.approx(1 / 3, abs=1e-3)
    assert float(flow.min_snr_weights(torch.ones(1), 4.0)) == 0
