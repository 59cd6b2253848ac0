"""Grey levels, grain and spectrum on cases with a known answer; and the features that need no weights."""

import numpy as np
import pytest

from ccmdist.evaluation.fidelity.appearance import (
    GRAIN_COLUMNS,
    NUM_FEATURES,
    SPECTRUM_COLUMNS,
    appearance,
    features,
    spectrum,
)


def test_grain_and_its_autocorrelation_are_those_of_the_noise():
    rng = np.random.default_rng(6)
    white = np.clip(rng.normal(100, 10, (128, 128)), 0, 255).round().astype(np.uint8)
    found = appearance(white, np.zeros_like(white, bool))
    assert found["grain"] == pytest.approx(0.1, rel=0.05)
    # Taking the smooth part away leaves a slightly negative correlation.
    assert found["grain_acf_x_1"] == pytest.approx(-0.1, abs=0.05)
    noise = rng.normal(0, 14, (128, 129))
    smeared = np.clip(100 + (noise[:, 1:] + noise[:, :-1]) / np.sqrt(2), 0, 255).round().astype(np.uint8)
    found = appearance(smeared, np.zeros_like(smeared, bool))
    assert found["grain_acf_x_1"] > 0.35
    assert found["grain_acf_y_1"] == pytest.approx(-0.1, abs=0.05)


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
    assert np.isnan(appearance(flat, np.zeros(shape, bool))["grain_acf_x_1"])


def test_the_autocorrelation_of_grain_is_that_of_its_lag_and_axis():
    noise = np.random.default_rng(9).normal(0, 12, (160, 163))
    # Each pixel repeats half of what lies 3 px to its left.
    repeated = np.clip(100 + noise[:, 3:] + 0.6 * noise[:, :-3], 0, 255).round().astype(np.uint8)
    found = appearance(repeated, np.zeros_like(repeated, bool))
    assert max(GRAIN_COLUMNS, key=found.__getitem__) == "grain_acf_x_3"
    turned = appearance(np.ascontiguousarray(repeated.T), np.zeros_like(repeated.T, bool))
    assert turned["grain_acf_y_3"] == pytest.approx(found["grain_acf_x_3"], abs=1e-9)
    assert [found[name] for name in SPECTRUM_COLUMNS] == pytest.approx(spectrum(repeated).tolist(), nan_ok=True)
