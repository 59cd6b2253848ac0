"""The diffusion of MSDM in training: what is drawn depends on a place alone, and the loss is what was asked for."""

from itertools import islice

import pytest
import torch

from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models import msdm_unet
from ccmdist.models.make import make_model
from ccmdist.precompute.fill import fill_cache
from ccmdist.train.objectives.choice import objective_of
from tests.small_msdm import VAE, write_encoders
from tests.unit.train.asked_model import OneRank

SIZE_PX = 64
MSDM = [
    "objective={kind: msdm, channels: [32, 32], layers_per_block: 1, norm_groups: 8, num_attention_levels: 1, "
    "heads: 4, cross_attention_dim: 32, null_fraction: 0.3}",
    "adapter=null",
    "base=null",
]


def data_of(folder, size_px=SIZE_PX):
    named = [f"data.{name}={folder}/{name}" for name in ("shards", "model", "cache")]
    return [*named, f"data.image_size_px={size_px}", "data.dtype=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("msdm")
    settings = {"subjects_per_group": 4, "frames_per_subject": 1, "size_px": SIZE_PX, "val_fraction": 0.3}
    write_phantom_set(PhantomShardsConfig(out=folder / "shards", **settings))
    write_encoders(folder / "model", SIZE_PX)
    fill_cache(load(PrecomputeConfig, [], data_of(folder)), 0, 1)
    return folder


def built(folder, *overrides):
    sizes = ["global_batch_size=4", "micro_batch_size=4", "run=none"]
    return objective_of(load(TrainConfig, [], [*MSDM, *data_of(folder), *sizes, *overrides]), OneRank())


@pytest.fixture(scope="module")
def made(folder):
    objective = built(folder)
    return objective, objective.build({})


@pytest.fixture(scope="module")
def batch(made):
    return next(iter(made[0].batches(0)))


def without_dropout(folder, *overrides):
    objective = built(folder, "objective.dropout=0", *overrides)
    return objective, objective.build({})


def test_the_cache_holds_prompts_of_one_length_and_latents_of_the_vae_masks_unscaled(made, batch):
    objective, _ = made
    assert batch["image_latents"].shape == (4, VAE.latent_channels, SIZE_PX // 4, SIZE_PX // 4)
    assert batch["mask_latents"].shape == batch["image_latents"].shape
    assert len({entry.num_text_tokens for entry in objective.entries}) == 1
    for entry in objective.entries:
        assert torch.equal(objective.cache.read_negative(entry), objective.null_LD), "text never sees the mask"
    codec = objective._codec()
    scaled = batch["mask_latents"] * codec.vae.config.scaling_factor
    assert (codec.decode(scaled) == codec.decode_structure(batch["mask_latents"])).all()


def test_the_loss_is_the_mean_error_of_what_the_network_is_asked_for(folder, batch):
    for prediction, loss in (("epsilon", "l1"), ("v_prediction", "l2")):
        objective, model = without_dropout(
            folder, f"objective.prediction={prediction}", f"objective.loss={loss}", "objective.null_fraction=0"
        )
        found = float(objective.loss(model, batch).detach())
        errors = []
        for place, position in enumerate(batch["positions"]):
            x = batch["image_latents"][place]
            noise, level = objective._draw(position, x.shape)
            alpha_bar = objective.schedule.alpha_bars[level]
            noisy = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
            told = batch["mask_latents"][place : place + 1], batch["prompt_embeds"][place : place + 1]
            predicted = msdm_unet.predicted(model, noisy[None], *told, level[None])[0]
            target = noise if prediction == "epsilon" else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x
            difference = predicted - target
            errors.append(float((difference.abs() if loss == "l1" else difference.square()).mean().detach()))
        assert found == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_noise_levels_and_dropped_prompts_depend_on_the_place_in_the_run_alone(made):
    objective, _ = made
    drawn = [objective._draw(position, (4, 2, 2)) for position in range(2000)]
    again = [objective._draw(position, (4, 2, 2)) for position in (3, 7)]
    assert all(
        torch.equal(one, two)
        for position, found in zip((3, 7), again, strict=True)
        for one, two in zip(drawn[position], found, strict=True)
    )
    levels = torch.stack([level for _, level in drawn]).double()
    assert levels.min() >= 0
    assert levels.max() <= 999
    assert levels.mean() == pytest.approx(499.5, abs=4 * 288.7 / 2000**0.5)
    share = sum(objective._is_dropped(position) for position in range(2000)) / 2000
    assert share == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


def test_dropout_depends_on_the_place_in_the_run_and_not_on_what_was_drawn_before(made, batch):
    objective, model = made
    first = objective.loss(model, batch)
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(objective.loss(model, batch), first)
    assert torch.equal(torch.get_rng_state(), state), "what others draw does not depend on it either"
    elsewhere = objective.loss(model, batch | {"positions": [10**6, *batch["positions"][1:]]})
    assert not torch.equal(elsewhere, first)


def test_held_out_losses_know_no_dropout_and_no_dropped_prompt(made):
    objective, model = made
    entry = objective.cache.entries("val")[0]
    losses = [objective._held_out_losses(model, entry) for _ in range(2)]
    assert torch.equal(*losses)
    assert model.training, "training goes on with dropout"
    told = objective.validate(model)
    assert list(told) == ["mean", "sigma_0.1", "sigma_0.3", "sigma_0.5", "sigma_0.7", "sigma_0.9"]


def test_the_noise_that_was_drawn_is_told_as_a_share(made):
    objective, model = made
    objective.drawn_sigmas()
    batches = list(islice(objective.batches(0), 3))
    for batch in batches:
        objective.loss(model, batch)
    drawn = objective.drawn_sigmas()
    levels = [objective._draw(position, (1,))[1] for batch in batches for position in batch["positions"]]
    expected = (1 - objective.schedule.alpha_bars[torch.stack(levels)]).sqrt()
    torch.testing.assert_close(drawn, expected)
    assert len(objective.drawn_sigmas()) == 0


def test_pictures_show_mask_real_and_drawn_and_what_the_first_step_sees(made):
    objective, model = made
    grids = objective.images(model)
    rows = min(len(objective.cache.entries("val")), objective.config.monitor.num_images)
    assert grids["samples/mask_real_sampled"].shape == (rows * SIZE_PX, 3 * SIZE_PX)
    (first,) = objective.first_batch_images().values()
    assert first.shape == (4 * SIZE_PX, 3 * SIZE_PX)


def test_without_a_mask_the_network_sees_none(folder, batch):
    objective, model = without_dropout(folder, "objective.mask_condition=false")
    assert model.config.in_channels == VAE.latent_channels
    other = batch | {"mask_latents": torch.zeros_like(batch["mask_latents"])}
    assert torch.equal(objective.loss(model, batch), objective.loss(model, other))


def test_latents_that_do_not_halve_and_models_without_them_are_refused(folder, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"channels: 6 levels need latents whose edge 32 divides; those of data\.image_size_px 64 have 16; "
        r"set data\.image_size_px to a multiple of 128, or use fewer levels",
    ):
        built(folder, "objective.channels=[32,32,32,32,32,32]")
    make_model("tiny", "2509", tmp_path / "qwen")
    with pytest.raises(ModelError, match="is a model of Qwen-Image-Edit 2509, expected one of MSDM; give the folder"):
        built(folder, f"data.model={tmp_path}/qwen")
