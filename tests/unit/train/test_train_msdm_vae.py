"""The VAE of MSDM in training: what a step sees depends on its position alone, and the loss is what was asked for."""

import logging
from itertools import islice

import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.stream import collated
from ccmdist.errors import ConfigError, ModelError
from ccmdist.jobs.train import describe
from ccmdist.models.text_encoders import tiny_text_encoder
from ccmdist.train.objectives.choice import objective_of
from ccmdist.train.objectives.spade import NO_BASE
from tests.unit.train.asked_model import OneRank

SIZE_PX = 64
VAE = [
    "objective={kind: msdm_vae, channels: [8, 16, 16], layers_per_block: 1, latent_channels: 4, norm_groups: 4, "
    "crop_px: 32, mask_share: 0.3, l1: 0.5, ssim: 0.25, kl: 0.01}",
    "adapter=null",
    "base=null",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae") / "shards"
    settings = {"subjects_per_group": 4, "frames_per_subject": 1, "size_px": SIZE_PX, "val_fraction": 0.3}
    write_phantom_set(PhantomShardsConfig(out=folder, **settings))
    return folder


def config(shards, *overrides):
    data = [f"data.shards={shards}", "data.model=none", f"data.image_size_px={SIZE_PX}"]
    sizes = ["global_batch_size=4", "micro_batch_size=4", "run=none"]
    return load(TrainConfig, [], [*VAE, *data, *sizes, *overrides])


def built(shards, *overrides):
    return objective_of(config(shards, *overrides), OneRank())


@pytest.fixture(scope="module")
def made(shards):
    objective = built(shards)
    return objective, objective.build({})


def crops(objective, positions):
    batch = collated(objective.source, [objective.entries[0]] * len(positions))
    return objective._crops(batch, positions)


def test_neither_cache_nor_model_folder_is_looked_at_and_nothing_frozen_is_known(made):
    objective, _ = made
    assert objective.base_digest == NO_BASE
    assert set(objective.parameter_sets()) == {"vae"}
    assert objective.sets_of_step(0) == objective.sets_of_step(1) == {"vae"}


def test_a_crop_depends_on_its_position_in_the_run_alone(made):
    objective, _ = made
    together = crops(objective, [5, 6, 7])
    assert together.shape == (3, 3, 32, 32)
    assert torch.equal(together[1:2], crops(objective, [6]))
    assert torch.equal(objective._noise([5, 6])[1:], objective._noise([6]))
    assert not torch.equal(together[0], together[1])


def test_a_crop_is_a_flipped_part_of_the_frame_or_of_the_mask_in_the_asked_share(made):
    objective, _ = made
    batch = collated(objective.source, [objective.entries[0]])
    whole = {"image": batch["images"][0, 0], "mask": batch["nerve_masks"][0].float() * 2 - 1}
    parts = {
        name: {
            picture[top : top + 32, left : left + 32].flip(axes).numpy().tobytes()
            for top in range(33)
            for left in range(33)
            for axes in ((), (0,), (1,), (0, 1))
        }
        for name, picture in whole.items()
    }
    found = crops(objective, range(400))[:, 0]
    kinds = [[name for name in parts if crop.contiguous().numpy().tobytes() in parts[name]] for crop in found]
    assert all(len(kind) == 1 for kind in kinds)
    assert 0.22 < sum(kind == ["mask"] for kind in kinds) / 400 < 0.38
    assert len({crop.contiguous().numpy().tobytes() for crop in found}) > 300


def test_the_loss_is_the_weighted_sum_of_parts_as_written_down_in_full(made):
    objective, model = made
    batch = next(iter(objective.batches(0)))
    given, noise = objective._crops(batch, batch["positions"]), objective._noise(batch["positions"])
    objective.describe()
    found = objective.loss(model, batch)
    with torch.no_grad():
        moments = model.vae.quant_conv(model.vae.encoder(given))
        mean, log_variance = moments.chunk(2, dim=1)
        back = model.vae.decode(mean + (0.5 * log_variance).exp() * noise).sample
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum() / len(given)
        expected = {
            "vae/mse": ((back - given) ** 2).mean(),
            "vae/l1": (back - given).abs().mean(),
            "vae/ssim": 1 - structural_similarity_index_measure(back, given, data_range=2.0),
            "vae/kl": kl,
        }
    told = objective.describe()
    assert told == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-5)
    weights = {"vae/mse": 1.0, "vae/l1": 0.5, "vae/ssim": 0.25, "vae/kl": 0.01}
    assert float(found.detach()) == pytest.approx(sum(weights[name] * told[name] for name in told), rel=1e-5)
    assert objective.describe() == {}


def test_every_weight_gets_a_gradient_and_some_steps_bring_frames_and_masks_back(made, shards):
    objective = built(shards, "seed=1")
    model = objective.build({})
    with torch.no_grad():
        before = objective.validate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for batch in islice(objective.batches(0), 12):
        optimizer.zero_grad()
        objective.loss(model, batch).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
    with torch.no_grad():
        after = objective.validate(model)
    assert set(after) == {"l1", "ssim", "mask_l1", "mask_ssim", "cl_dice"}
    assert after["l1"] < 0.7 * before["l1"]
    assert after["mask_l1"] < before["mask_l1"]


def test_pictures_show_mask_and_frame_each_beside_what_comes_back(made):
    objective, model = made
    (picture,) = objective.images(model).values()
    assert picture.dtype == torch.uint8
    num_rows = min(len(objective.samples.entries("val")), 4)
    assert picture.shape == (num_rows * SIZE_PX, 4 * SIZE_PX)
    batch = collated(objective.source, [objective.samples.entries("val")[0]])
    assert torch.equal(picture[:SIZE_PX, :SIZE_PX], batch["nerve_masks"][0].to(torch.uint8) * 255)
    assert objective.first_batch_images()["first_batch/crops"].shape == (32, 4 * 32)


def test_no_lpips_without_a_file_is_said(shards, caplog):
    logging.getLogger("ccmdist").propagate = True
    with caplog.at_level(logging.INFO):
        assert built(shards).perceptual is None
    assert "no LPIPS in the loss, for objective.perceptual_weights names no file" in caplog.text
    assert built(shards, "objective.perceptual=0").perceptual is None


def test_what_is_frozen_is_known_by_its_content_and_refused_at_once_if_it_cannot_be_used(shards, tmp_path):
    tiny = tiny_text_encoder()
    for name in ("one", "two"):
        tiny.model.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)
    one, two = (built(shards, f"objective.text_encoder={tmp_path / name}").base_digest for name in ("one", "two"))
    assert one == two != NO_BASE
    (tmp_path / "two" / "config.json").write_text((tmp_path / "two" / "config.json").read_text() + "\n")
    assert built(shards, f"objective.text_encoder={tmp_path / 'two'}").base_digest != one
    with pytest.raises(ModelError, match="there is no such folder"):
        built(shards, f"objective.text_encoder={tmp_path / 'three'}")
    with pytest.raises(ModelError, match="cannot be read as weights"):
        built(shards, f"objective.perceptual_weights={tmp_path / 'vgg.pth'}")


def test_a_text_encoder_that_is_too_short_for_a_prompt_is_refused_before_the_vae_is_trained(shards):
    with pytest.raises(
        ConfigError, match=r"has \d+ tokens, the text encoder \(BertModel\) takes 32; train msdm_vae with"
    ):
        built(shards, "objective.max_text_tokens=32")
    built(shards, "objective.max_text_tokens=40")


def test_a_dry_run_tells_what_is_trained_and_refuses_files_that_are_not_there(shards, tmp_path):
    assert describe(config(shards)).startswith("model: msdm_vae from scratch, on pixels\nsamples: ")
    with pytest.raises(ConfigError, match=rf"objective.text_encoder: {tmp_path}/bert is not there; copy it there from"):
        describe(config(shards, f"objective.text_encoder={tmp_path}/bert"))
