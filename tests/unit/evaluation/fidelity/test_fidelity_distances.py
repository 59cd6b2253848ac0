"""Paired similarity and Frechet distances on cases with a known answer."""

import numpy as np
import pandas as pd
import pytest

from ccmdist.ccm.phantom import make_phantom
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.fidelity.appearance import (
    EXTRACTOR,
    EXTRACTOR_SHA256,
    NUM_FEATURES,
    appearance,
    features,
    spectrum,
)
from ccmdist.evaluation.fidelity.distances import FrechetComparison, compare_features, frechet_distance, psnr_db, ssim

COLUMNS = ["a", "b", "c"]


def features_of(num_subjects, frames, seed, shift=0.0, prefix="s"):
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.normal(shift, 1, (num_subjects * frames, 3)), columns=COLUMNS)
    table["subject"] = np.repeat([f"{prefix}{index:03d}" for index in range(num_subjects)], frames)
    return table


def test_the_frechet_distance_of_a_set_to_itself_is_zero():
    values = np.random.default_rng(0).normal(size=(50, 5))
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-9)


def test_the_frechet_distance_of_moved_and_stretched_sets_is_that_of_their_normal_distributions():
    values = np.random.default_rng(1).normal(size=(400, 4))
    assert frechet_distance(values, values + 2) == pytest.approx(16)
    spread = np.trace(np.cov(values, rowvar=False))
    assert frechet_distance(values, values.mean(0) + 3 * (values - values.mean(0))) == pytest.approx(4 * spread)


def test_identical_sets_lie_at_the_floor_and_shifted_ones_above_it():
    real = features_of(30, 2, seed=2)
    same = compare_features(real, real, COLUMNS, np.random.default_rng(0))
    assert same.distance == pytest.approx(0, abs=1e-9)
    assert same.floor_range[0] < same.distance_of_halves < same.floor_range[1]
    shifted = real.assign(a=real["a"] + 2)
    moved = compare_features(real, shifted, COLUMNS, np.random.default_rng(0))
    assert moved.distance_of_halves > 2 * moved.floor_range[1]
    assert moved.floor == same.floor


def test_the_floor_falls_with_the_number_of_images_so_the_number_stands_beside_it():
    few, many = (
        compare_features(t, t, COLUMNS, np.random.default_rng(0)) for t in (features_of(8, 2, 3), features_of(80, 2, 3))
    )
    assert many.floor < few.floor / 3
    assert (few.num_in_half, many.num_in_half) == (8, 80)


def test_a_distance_tells_its_counts_extractor_hash_and_floor():
    real = features_of(10, 2, seed=4)
    text = str(compare_features(real, real, COLUMNS, np.random.default_rng(0)))
    assert "n = 20 and 20" in text
    assert EXTRACTOR in text
    assert EXTRACTOR_SHA256[:12] in text
    assert "real floor" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"extractor_sha256": ""}, "without its extractor, that one's hash, the number of images and the real floor"),
        ({"num_real": 0}, "is not reported; give all of them"),
        ({"floor": float("nan")}, "the real floor"),
        ({"extractor": "FID-like"}, "only Inception's pool features make an FID"),
    ],
)
def test_a_distance_without_what_it_takes_to_read_it_cannot_be_made(changed, message):
    whole = {
        "distance": 1.0,
        "distance_of_halves": 1.0,
        "floor": 0.5,
        "floor_range": (0.1, 0.9),
        "num_real": 20,
        "num_synthetic": 20,
        "num_in_half": 10,
        "extractor": EXTRACTOR,
        "extractor_sha256": EXTRACTOR_SHA256,
    }
    FrechetComparison(**whole)
    with pytest.raises(EvaluationError, match=message):
        FrechetComparison(**(whole | changed))


def test_halves_need_four_subjects():
    real = features_of(3, 10, seed=5)
    with pytest.raises(EvaluationError, match="3 real subjects, expected at least 4"):
        compare_features(real, real, COLUMNS, np.random.default_rng(0))


def test_similarity_of_equal_and_of_noisy_frames():
    image = make_phantom("Control", 1, 96).image
    assert ssim(image, image) == pytest.approx(1)
    assert psnr_db(image, image) == 100
    brighter = np.clip(image.astype(int) + 10, 0, 255).astype(np.uint8)
    assert psnr_db(np.full((9, 9), 100, np.uint8), np.full((9, 9), 110, np.uint8)) == pytest.approx(28.13, abs=0.01)
    noisy = np.clip(image + np.random.default_rng(0).normal(0, 25, image.shape), 0, 255).astype(np.uint8)
    assert ssim(image, noisy) < ssim(image, brighter) < 1


def test_grain_and_its_autocorrelation_are_those_of_the_noise():
    rng = np.random.default_rng(6)
    white = np.clip(rng.normal(100, 10, (128, 128)), 0, 255).round().astype(np.uint8)
    found = appearance(white, np.zeros_like(white, bool))
    assert found["grain"] == pytest.approx(0.1, rel=0.05)
    # Taking the smooth part away leaves a slightly negative correlation.
    assert found["grain_acf_x"] == pytest.approx(-0.1, abs=0.05)
    noise = rng.normal(0, 14, (128, 129))
    smeared = np.clip(100 + (noise[:, 1:] + noise[:, :-1]) / np.sqrt(2), 0, 255).round().astype(np.uint8)
    found = appearance(smeared, np.zeros_like(smeared, bool))
    assert found["grain_acf_x"] > 0.35
    assert found["grain_acf_y"] == pytest.approx(-0.1, abs=0.05)


def test_the_spectrum_of_white_noise_is_flat_and_that_of_a_ramp_of_power_has_its_slope():
    rng = np.random.default_rng(7)
    white = np.clip(rng.normal(128, 20, (256, 256)), 0, 255).round().astype(np.uint8)
    found = appearance(white, np.zeros_like(white, bool))
    assert found["slope_low"] == pytest.approx(0, abs=0.25)
    assert found["slope_high"] == pytest.approx(0, abs=0.1)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256))
    pink = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(256, 256))) / np.maximum(frequency, 1 / 256))
    image = np.clip(128 + 40 * pink / pink.std(), 0, 255).round().astype(np.uint8)
    found = appearance(image, np.zeros_like(image, bool))
    assert found["slope_low"] == pytest.approx(-2, abs=0.2)
    assert found["slope_high"] == pytest.approx(-2, abs=0.2)


@pytest.mark.parametrize("shape", [(64, 64), (96, 128)])
def test_features_are_finite_for_any_image_and_differ_between_images(shape):
    flat = np.full(shape, 90, np.uint8)
    noisy = np.random.default_rng(8).integers(0, 255, shape).astype(np.uint8)
    for image in (flat, noisy):
        assert features(image).shape == (NUM_FEATURES,)
        assert np.isfinite(features(image)).all()
        assert np.isfinite(spectrum(image)).sum() >= 14
    assert np.abs(features(flat) - features(noisy)).max() > 1
    assert np.isnan(appearance(flat, np.zeros(shape, bool))["grain_acf_x"])
