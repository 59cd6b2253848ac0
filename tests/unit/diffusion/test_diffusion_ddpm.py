"""Noise, targets and steps of the diffusion in 1000 levels are those of diffusers' schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ccmdist.config.objectives.msdm import MsdmSettings
from ccmdist.diffusion import ddpm
from ccmdist.errors import ConfigError
from ccmdist.models.msdm_unet import scheduler_config

SHAPE = (3, 8, 4, 4)


def random(seed, *shape):
    return torch.randn(*(shape or SHAPE), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["epsilon", "v_prediction"])
def schedule(request):
    return ddpm.NoiseSchedule.of(MsdmSettings(prediction=request.param))


def stock(schedule, of=DDIMScheduler, **more):
    config = scheduler_config(MsdmSettings(prediction=schedule.prediction))
    return of(
        **{name: value for name, value in config.items() if of is DDIMScheduler or name != "set_alpha_to_one"} | more
    )


def a_model(latents, level):
    """Predictions that depend on latents and level."""
    return torch.tanh(latents * 0.7 + level / 1000), torch.sin(latents + level / 300)


def test_noise_and_targets_of_training_are_those_of_diffusers(schedule):
    x, noise, level = random(0), random(1), torch.tensor([0, 421, 999])
    theirs = stock(schedule)
    assert torch.equal(schedule.alpha_bars, theirs.alphas_cumprod)
    assert torch.equal(schedule.noisy(x, noise, level), theirs.add_noise(x, noise, level))
    expected = noise if schedule.prediction == "epsilon" else theirs.get_velocity(x, noise, level)
    assert torch.equal(schedule.target(x, noise, level), expected)
    for one, image, what in zip(level, x, noise, strict=True):
        noisy = schedule.noisy(image[None], what[None], one[None])
        found = schedule.split(schedule.target(image[None], what[None], one[None]), noisy, int(one))
        # At the last level the image is a hundredth of what is seen: 1e-7 of rounding becomes 1e-5.
        torch.testing.assert_close(torch.cat(found), torch.stack([image, what]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("num_denoise_steps", [1, 4, 10, 25, 150, 999])
def test_levels_of_a_sampler_are_those_of_diffusers(schedule, num_denoise_steps):
    theirs = stock(schedule)
    theirs.set_timesteps(num_denoise_steps)
    assert list(ddpm.sampling_levels(num_denoise_steps)) == theirs.timesteps.tolist()


def test_all_levels_are_those_of_ddpm(schedule):
    theirs = stock(schedule, DDPMScheduler, steps_offset=0)
    theirs.set_timesteps(1000)
    assert list(ddpm.sampling_levels(1000)) == theirs.timesteps.tolist()


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_those_of_diffusers_ddim(schedule, eta, guidance_scale):
    theirs, latents = stock(schedule), random(2)
    theirs.set_timesteps(10)
    found = ddpm.sample(
        lambda x, level: a_model(x, level)[: 2 if guidance_scale > 1 else 1],
        latents,
        schedule,
        10,
        guidance_scale,
        eta,
        lambda step: random(100 + step),
    )
    for step, level in enumerate(theirs.timesteps):
        conditional, unconditional = a_model(latents, int(level))
        guided = unconditional + guidance_scale * (conditional - unconditional)
        latents = theirs.step(guided, level, latents, eta=eta, variance_noise=random(100 + step)).prev_sample
    # Epsilon divides by sqrt(alpha_bar), a hundredth at the first level; images are up to 300 then, and so is rounding.
    torch.testing.assert_close(found, latents, rtol=1e-5, atol=1e-6 * float(latents.abs().max()))


def test_with_eta_one_and_all_levels_a_step_is_one_of_ddpm(schedule):
    """All but the last two: at level 0 DDPM takes the image without noise, here as in DDIM what is left stays."""
    theirs, start = stock(schedule, DDPMScheduler, steps_offset=0), random(3)
    theirs.set_timesteps(1000)
    seen = []

    def seeing(latents, level):
        seen.append(latents)
        return a_model(latents, level)[:1]

    ddpm.sample(seeing, start, schedule, 1000, eta=1.0, fresh_noise=random)
    for step in (0, 1, 500, 900, 997):
        level = 999 - step
        # Their generator draws what ours is handed.
        generator = torch.Generator().manual_seed(step)
        expected = theirs.step(a_model(seen[step], level)[0], level, seen[step], generator=generator).prev_sample
        # Differences of cumulated products, in fp32, are their variance of a step: 1e-3 of what noise is added.
        torch.testing.assert_close(seen[step + 1], expected, rtol=1e-4, atol=2e-4)


def test_guidance_without_its_second_prediction_is_not_passed_over(schedule):
    with pytest.raises(AssertionError, match=r"guidance 3\.0 needs 2 predictions, got 1"):
        ddpm.sample(lambda x, level: (x,), random(0), schedule, 2, 3.0)


@pytest.mark.parametrize("num_denoise_steps", [0, 1001])
def test_more_steps_than_levels_are_refused(num_denoise_steps):
    with pytest.raises(ConfigError, match=f"denoise_steps: {num_denoise_steps}, but the model knows 1000 noise levels"):
        ddpm.sampling_levels(num_denoise_steps)
