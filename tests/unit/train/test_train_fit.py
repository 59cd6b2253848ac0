"""The fits of the tiny VAE and MMDiT: repeatable, and the weights that come along are as good as is said."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ccmdist.diffusion.seeding import generator
from ccmdist.errors import ModelError
from ccmdist.jobs.model import fit as fit_job
from ccmdist.models import mmdit
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.make import FITTED, make_model, make_transformer, make_vae
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.sizes import SIZES
from ccmdist.train.fit.mmdit import KINDS, Samples, coarse, flow_loss, sketch
from ccmdist.train.fit.optimizer import FitOptimizer, orthogonalised
from ccmdist.train.fit.phantoms import fit_frames, held_out_frames
from ccmdist.train.fit.run import FULL, vae_figures
from ccmdist.train.fit.vae import VaeFit, fit_vae, idleness, reconstruction_loss

MAX_FILE_BYTES = 1_900_000
MIN_CORRELATION = 0.95


@pytest.fixture(scope="module")
def quick_fits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The same quick fit twice."""
    folders = tuple(tmp_path_factory.mktemp("fits") / name for name in ("first", "second"))
    for folder in folders:
        fit_job(folder, seed=0, quick=True)
    return folders


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The model folder of the weights that come along."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_model("tiny", "2509", folder, fitted=True)
    return ModelFolder.open(folder)


def test_the_same_seed_gives_bitwise_the_same_weights(quick_fits: tuple[Path, Path]) -> None:
    first, second = quick_fits
    files = sorted(path.relative_to(first) for path in first.glob("*/*"))
    assert {file.parent.name for file in files} == {"vae", "transformer"}
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_a_fit_that_was_interrupted_goes_on_with_the_part_that_is_missing(
    quick_fits: tuple[Path, Path], tmp_path: Path
) -> None:
    done, again = quick_fits[0], tmp_path / "again"
    (again / "vae").mkdir(parents=True)
    for file in (done / "vae").iterdir():
        (again / "vae" / file.name).write_bytes(file.read_bytes())
    record = json.loads((done / "fit.json").read_text())
    minutes = record["vae"]["minutes"] = 123.0
    del record["transformer"]
    (again / "fit.json").write_text(json.dumps(record))
    fit_job(again, seed=0, quick=True)
    assert json.loads((again / "fit.json").read_text())["vae"]["minutes"] == minutes
    for file in (done / "transformer").iterdir():
        assert (again / "transformer" / file.name).read_bytes() == file.read_bytes()


def test_a_folder_of_another_fit_is_refused(quick_fits: tuple[Path, Path]) -> None:
    with pytest.raises(
        ModelError, match=r"fit\.json: is of another fit, with seed 0 instead of 1; choose another folder"
    ):
        fit_job(quick_fits[0], seed=1, quick=True)


def test_the_loss_of_the_vae_falls_within_a_few_steps() -> None:
    frames, few = fit_frames(6, 0), VaeFit(num_frames=6, num_steps=16, num_decoder_steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = LatentCodec(make_vae(SIZES["tiny"])).vae
    crops = held_out_frames(6).images[:, :40, :40]
    before = reconstruction_loss(untrained, crops).item()
    after = reconstruction_loss(fit_vae(frames, few, 0), crops).item()
    assert after < 0.9 * before


def test_the_loss_of_the_mmdit_falls_within_a_few_steps() -> None:
    """On structured latents: all positions of a sample are alike, which is soon learnt."""
    source = generator(0, "test")
    latents = torch.randn(8, 1, 64, generator=source).expand(8, 64, 64).contiguous()
    embeds = {name: torch.randn(8, 4, 64, generator=source) for name in ("Control", " ")}
    samples = Samples(latents, dict.fromkeys(KINDS, -latents), embeds, ("Control",) * 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make_transformer(SIZES["tiny"], "2509")
    optimizer = FitOptimizer(model, lr=0.02, num_steps=16, warmup_steps=2)
    losses = [optimizer.step(flow_loss(model, samples, 4, generator(0, step))) for step in range(16)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (24, 24)])
def test_orthogonalised_keeps_directions_and_levels_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=generator(0, "matrix"))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    levelled = left.T @ orthogonalised(matrix) @ right.T
    assert torch.all((levelled.diagonal() > 0.6) & (levelled.diagonal() < 1.3))
    assert (levelled - levelled.diagonal().diag()).abs().max() < 1e-3


def test_orthogonalised_leaves_zeros_where_there_is_no_gradient() -> None:
    matrix = torch.randn(8, 40, generator=generator(0, "matrix"))
    matrix[:, 10:] = 0
    assert not orthogonalised(matrix)[:, 10:].any()


def test_a_sketch_has_black_strokes_where_the_image_has_bright_lines() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[:, 30:33] = 255
    drawn = sketch(image)
    assert set(np.unique(drawn)) == {0, 255}
    assert drawn[:, 30:33].max() == 0 and drawn[:, :26].min() == 255 and drawn[:, 37:].min() == 255


def test_a_coarse_copy_is_as_bright_but_has_no_detail() -> None:
    image = np.zeros((64, 64), np.uint8)
    image[::2] = 200
    assert np.ptp(coarse(image)) == 0 and coarse(image).mean() == 100


def test_channels_that_repeat_others_are_idle() -> None:
    latents = torch.randn(4, 16, 1, 5, 5, generator=generator(0, "latents"))
    repeated = latents.clone()
    repeated[:, 8:] = repeated[:, :8] + repeated[:, [0]]
    assert idleness(repeated) > idleness(latents) + 10


def test_fitted_weights_are_small_files_of_a_recorded_full_fit() -> None:
    record = json.loads((FITTED / "fit.json").read_text())
    assert record["settings"]["vae"]["num_steps"] == FULL.vae.num_steps
    assert record["settings"]["mmdit"]["num_steps"] == FULL.mmdit.num_steps
    assert max(file.stat().st_size for file in FITTED.rglob("*") if file.is_file()) <= MAX_FILE_BYTES


def test_the_fitted_vae_shows_frames_and_masks_that_no_fit_has_seen(fitted: ModelFolder) -> None:
    figures = vae_figures(LatentCodec.load(fitted, torch.float32, "cpu"), FULL.num_held_out)
    assert figures["r_of_images"]["all_pixels"] >= MIN_CORRELATION
    assert figures["r_of_masks"]["all_pixels"] >= MIN_CORRELATION
    recorded = json.loads((FITTED / "fit.json").read_text())["vae"]
    # Other processors and versions of libraries differ in the order of float additions.
    assert figures["r_of_images"]["all_pixels"] == pytest.approx(recorded["r_of_images"]["all_pixels"], abs=2e-3)


def test_latents_of_the_fitted_vae_have_about_unit_variance_per_channel(fitted: ModelFolder) -> None:
    latents = LatentCodec.load(fitted, torch.float32, "cpu").encode(held_out_frames(24).images)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.3
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.3


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
def test_the_fitted_transformer_predicts_noise_minus_x_better_than_nothing(version: str, tmp_path: Path) -> None:
    make_model("tiny", version, tmp_path / "tiny", fitted=True)
    folder = ModelFolder.open(tmp_path / "tiny")
    model = mmdit.build(folder, torch.float32, None)
    source = generator(0, "velocity")
    noise = torch.randn(2, 64, 64, generator=source)
    with torch.no_grad():
        predicted = mmdit.velocity(
            model,
            noise,
            torch.zeros_like(noise),
            torch.randn(2, 50, 64, generator=source),
            torch.ones(2),
            (8, 8),
            (8, 8),
        )
    # At sigma 1 the best guess of noise - x is the noise itself.
    assert (predicted - noise).square().mean() < 0.5
