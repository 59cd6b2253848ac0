"""The segmenter's own error, measured on phantoms whose nerves are known; and what it must not see."""

import time

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

from ccmdist.ccm import segmenter
from ccmdist.ccm.biomarkers import biomarkers
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_phantom
from ccmdist.ccm.segmenter import SEGMENTER_VERSION, segment
from ccmdist.ccm.skeleton import centreline_of

UM_PER_PX = 400 / 384
FOUND_PX = 708


def shares(found, true):
    """Of the found centreline that lies on true nerves, and of the true one that was found, at 2 px."""
    near = [binary_dilation(mask, iterations=2) for mask in (true, found)]
    lines = centreline_of(found), centreline_of(true)
    return [float(reach[line].mean()) for reach, line in zip(near, lines, strict=True)]


def test_nerves_of_phantoms_are_found_with_an_error_that_is_known():
    phantoms = [make_phantom(group, seed, 384) for group in CLINICAL_GROUPS for seed in range(4)]
    found = [segment(phantom.image) for phantom in phantoms]
    precision, recall = np.mean(
        [shares(mask, phantom.nerve_mask) for mask, phantom in zip(found, phantoms, strict=True)], axis=0
    )
    assert precision > 0.85
    assert recall > 0.75
    dice = [
        2 * (mask & phantom.nerve_mask).sum() / (mask.sum() + phantom.nerve_mask.sum())
        for mask, phantom in zip(found, phantoms, strict=True)
    ]
    # A nerve is 2.4 px wide: one pixel beside it costs a third of the overlap.
    assert np.mean(dice) > 0.65
    true_cnfl = np.array([phantom.labels["cnfl"] for phantom in phantoms])
    found_cnfl = np.array([biomarkers(mask, UM_PER_PX).cnfl for mask in found])
    assert np.corrcoef(true_cnfl, found_cnfl)[0, 1] > 0.85
    assert 0.75 < found_cnfl.mean() / true_cnfl.mean() < 1.05


def test_width_is_seen_and_not_assumed():
    rng = np.random.default_rng(0)
    columns = np.arange(256) - 128
    widths = []
    for sigma_px in (1.0, 2.2):
        image = 60 + 80 * np.exp(-0.5 * (columns / sigma_px) ** 2) + rng.normal(0, 8, (256, 256))
        widths.append(biomarkers(segment(np.clip(image, 0, 255).astype(np.uint8)), 1.0).cnfw_um)
    assert widths[1] > 1.4 * widths[0]


@pytest.mark.parametrize("angle_deg", [0, 20, 45, 70, 90, 135])
def test_a_line_is_found_at_every_angle(angle_deg):
    rows, columns = np.mgrid[-64:64, -64:64]
    across = rows * np.cos(np.deg2rad(angle_deg)) - columns * np.sin(np.deg2rad(angle_deg))
    image = 70 + 60 * np.exp(-0.5 * (across / 1.2) ** 2) + np.random.default_rng(1).normal(0, 10, across.shape)
    found = segment(np.clip(image, 0, 255).astype(np.uint8))
    true = np.abs(across) <= 1.2
    precision, recall = shares(found, true)
    assert precision > 0.97
    assert recall > 0.97


@pytest.mark.parametrize("grey", [0, 1, 128, 255])
def test_a_flat_image_has_no_nerves(grey):
    assert not segment(np.full((96, 96), grey, np.uint8)).any()


def test_bright_points_and_noise_are_hardly_taken_for_nerves():
    rng = np.random.default_rng(2)
    image = rng.normal(70, 12, (384, 384))
    image[rng.integers(0, 384, 40), rng.integers(0, 384, 40)] = 255
    assert segment(np.clip(image, 0, 255).astype(np.uint8)).mean() < 0.002


@pytest.mark.parametrize("shape", [(64, 64), (65, 127), (200, 64), (1024, 1024)])
def test_frames_of_any_size_are_taken(shape):
    image = np.random.default_rng(3).integers(60, 90, shape).astype(np.uint8)
    mask = segment(image)
    assert mask.shape == shape
    assert mask.dtype == bool


def test_the_same_image_gives_the_same_mask_whatever_came_before():
    image = make_phantom("Control", 5, 128).image
    first = segment(image)
    segment(make_phantom("T1DPN", 6, 96).image)
    assert np.array_equal(first, segment(image))


def test_it_is_frozen():
    """Whoever changes what the segmenter finds has to give it another version."""
    image = make_phantom("T1NoDPN", 11, 128).image
    constants = {
        name: value
        for name, value in vars(segmenter).items()
        if name.isupper() and name not in ("ANGLES", "_PADDING_PX")
    }
    assert SEGMENTER_VERSION == "ridge-1"
    assert constants == {
        "SEGMENTER_VERSION": "ridge-1",
        "NUM_ORIENTATIONS": 16,
        "RIDGE_SIGMAS_PX": (1.2, 1.8),
        "ALONG_SIGMA_PX": 4.0,
        "HALF_REACH_PX": 4.0,
        "BACKGROUND_SIGMA_PX": 14.0,
        "SPREAD_SIGMA_PX": 20.0,
        "MIN_SPREAD_GREY": 2.0,
        "WEAK_RESPONSE": 3.3,
        "STRONG_RESPONSE": 6.5,
        "MIN_LENGTH_PX": 24,
        "MAX_SPUR_PX": 8,
        "MAX_HALF_WIDTH_PX": 3.0,
        "PROFILE_SIGMA_PX": 0.6,
        "EDGE_SHARE": 0.6,
    }
    assert segment(image).sum() == pytest.approx(FOUND_PX, abs=4)


def test_it_is_fast_enough_for_thousands_of_frames():
    image = make_phantom("Control", 1, 128).image
    segment(image)
    start = time.process_time()
    for _ in range(5):
        segment(image)
    assert (time.process_time() - start) / 5 < 0.1


@pytest.mark.parametrize("image", [np.zeros((64, 64)), np.zeros((64, 64, 3), np.uint8)])
def test_what_is_not_8_bit_grey_is_refused(image):
    with pytest.raises(ValueError, match="expected uint8 of shape"):
        segment(image)
