"""Measures inside holes: against slow and obvious ones, blind to what lies outside, and fair to simple fills."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_dilation, gaussian_filter, gaussian_laplace
from skimage.metrics import structural_similarity

from ccmdist.data.holes import hole
from ccmdist.data.phantom_shards import sample
from ccmdist.evaluation.fidelity.appearance import LOG_SIGMAS_PX
from ccmdist.evaluation.fidelity.completion import completion_of
from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS, filled
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE, IS_OWN, REACH_PX, SHARE, column, in_hole, on_off

SHAPES = ("rectangle", "stroke", "band", "quadrant")
SIZE_PX = 192


@pytest.fixture(scope="module")
def frame():
    return sample(0, "Control", 0, 0, SIZE_PX).image


@pytest.fixture(scope="module")
def other():
    return sample(0, "Control", 1, 0, SIZE_PX).image


def slow(frame, hole, fill):
    """The measures by loops over pixels, of whole images."""
    image = np.where(hole, fill, frame)
    _, similarity = structural_similarity(
        frame, image, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    error = [(float(a) - float(b)) ** 2 for a, b in zip(frame[hole], image[hole], strict=True)]
    vectors = []
    for one in (frame.astype(float), image.astype(float)):
        seen = []
        for sigma in LOG_SIGMAS_PX:
            response = (
                -sigma * sigma * (gaussian_laplace(one, sigma) - one * gaussian_laplace(np.ones((9, 9)), sigma)[4, 4])
            )
            seen += [gaussian_filter(response.clip(min=0), sigma), gaussian_filter((-response).clip(min=0), sigma)]
        vectors.append([np.array([part[y, x] for part in seen]) for y, x in zip(*np.nonzero(hole), strict=True)])
    distances = []
    for a, b in zip(*vectors, strict=True):
        a, b = a / np.sqrt(a @ a + 1), b / np.sqrt(b @ b + 1)
        distances.append((a - b) @ (a - b))
    return {
        "ssim": similarity[hole].mean(),
        "psnr_db": 10 * np.log10(255**2 / np.mean(error)),
        "filter_distance": np.mean(distances),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_the_measures_equal_slow_ones_of_whole_images(shape, frame, other):
    cut = hole(shape, SIZE_PX, np.random.default_rng(3))
    found = in_hole(frame, cut, {"x": other})["x"]
    assert found == pytest.approx(slow(frame, cut, other), rel=1e-9)


def test_a_small_hole_is_compared_in_a_part_of_the_image_alone(frame, other):
    cut = np.zeros((SIZE_PX, SIZE_PX), bool)
    cut[20:30, 60:80] = True
    assert 80 + REACH_PX < SIZE_PX, "else all of it is looked at"
    assert in_hole(frame, cut, {"x": other})["x"] == pytest.approx(slow(frame, cut, other), rel=1e-9)


@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES))
def test_what_an_image_holds_outside_of_its_hole_changes_nothing(seed, shape):
    rng = np.random.default_rng(seed)
    frame, image, noise = rng.integers(0, 256, (3, 64, 64)).astype(np.uint8)
    cut = hole(shape, 64, rng)
    found = in_hole(frame, cut, {"x": image, "y": np.where(cut, image, noise)})
    assert found["x"] == found["y"]
    same = in_hole(frame, cut, {"x": np.where(cut, frame, noise)})["x"]
    assert (same["psnr_db"], same["filter_distance"]) == (100.0, 0.0)
    assert same["ssim"] == pytest.approx(1, abs=1e-12)


def test_filters_see_vectors_of_at_most_unit_length_and_nothing_in_a_flat_patch(frame):
    lengths = np.linalg.norm(on_off(frame), axis=-1)
    assert on_off(frame).shape == (SIZE_PX, SIZE_PX, 2 * len(LOG_SIGMAS_PX))
    assert 0.5 < lengths.min() <= lengths.max() < 1
    assert np.abs(on_off(np.full((64, 64), 90, np.uint8))).max() < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_the_filter_distance_tells_the_true_place_from_real_grain_and_both_from_a_smooth_fill(shape, frame, other):
    cut = hole(shape, SIZE_PX, np.random.default_rng(5))
    noisy = (frame + np.random.default_rng(0).normal(0, 8, frame.shape)).clip(0, 255).round().astype(np.uint8)
    fills = {"noisy": noisy, **filled(frame, cut, other)}
    distances = {name: found["filter_distance"] for name, found in in_hole(frame, cut, fills).items()}
    assert distances["noisy"] < 0.1
    assert distances["noisy"] < distances["other_frame"] / 3
    assert distances["other_frame"] < 0.8 * min(distances["rim_mean"], distances["biharmonic"])


def test_simple_fills_take_the_rim_alone_and_leave_the_rest_as_it_is(frame, other):
    cut = hole("rectangle", SIZE_PX, np.random.default_rng(1))
    hidden = np.where(cut, np.uint8(7), frame)
    fills = filled(hidden, cut, other)
    assert list(fills) == [name for name in FILLS if name != DRAWN]
    for name, fill in filled(frame, cut, other).items():
        assert np.array_equal(fill, fills[name]), name
        assert np.array_equal(fill[~cut], frame[~cut]), name
    rim = binary_dilation(cut, iterations=4) & ~cut
    assert np.unique(fills["rim_mean"][cut]).tolist() == [round(frame[rim].mean())]
    assert np.array_equal(fills["other_frame"][cut], other[cut])


def test_the_biharmonic_fill_continues_a_slope():
    slope = np.add.outer(np.arange(64), 2 * np.arange(64)).astype(np.uint8)
    cut = np.zeros((64, 64), bool)
    cut[20:35, 15:40] = True
    assert np.abs(filled(slope, cut, None)["biharmonic"].astype(int) - slope).max() <= 1


def test_a_hole_without_a_rim_and_one_too_large_are_not_filled_by_it(frame, other, monkeypatch):
    assert list(filled(frame, np.ones_like(frame, bool), other)) == ["other_frame"]
    monkeypatch.setattr("ccmdist.evaluation.fidelity.fills.MAX_BIHARMONIC_PX", 10)
    cut = hole("rectangle", SIZE_PX, np.random.default_rng(1))
    assert list(filled(frame, cut, None)) == ["rim_mean"]


def table_of(num_subjects=6, num_frames=2):
    """Repaired frames whose measures are known, and a whole image."""
    rng = np.random.default_rng(0)
    rows = []
    for subject in range(num_subjects):
        for _ in range(num_frames):
            row = {"subject": f"s{subject}", SHARE: 0.25, IS_OWN: 0.0}
            for place, fill in enumerate(FILLS):
                row |= {column(fill, measure): 10 - place + 0.01 * rng.normal() for measure in IN_HOLE}
            rows.append(row)
    return pd.DataFrame([*rows, {"subject": "s0"}])


def completion(table, min_images=2):
    return completion_of(table, min_images, 300, np.random.default_rng(0))


def test_figures_are_means_over_subjects_with_their_count_and_the_gain_over_each_fill():
    table = table_of()
    table.loc[0, column(DRAWN, "ssim")] += 12  # one image of one subject counts a twelfth
    found, left_out = completion(table)
    assert (found.num_images, found.num_whole_images, found.share, left_out) == (12, 1, 0.25, [])
    assert len(found.measures) == len(FILLS) * len(IN_HOLE)
    drawn, rim = found.measure(DRAWN, "ssim"), found.measure("rim_mean", "ssim")
    assert drawn.mean == pytest.approx(11, abs=0.01)
    assert (drawn.num_images, drawn.num_subjects, drawn.gain) == (12, 6, None)
    assert rim.gain == pytest.approx(drawn.mean - rim.mean, abs=1e-9)
    assert rim.gain_interval[0] < rim.gain < rim.gain_interval[1]
    # Less of the filter distance is better.
    closer = found.measure("rim_mean", "filter_distance")
    assert closer.gain == pytest.approx(-1, abs=0.02)
    assert closer.gain_interval[1] < 0


def test_a_set_without_repaired_frames_has_no_figures():
    assert completion(pd.DataFrame([{"subject": "s0"}])) == (None, [])


def test_too_few_images_or_subjects_are_left_out_with_the_reason():
    found, left_out = completion(table_of(num_subjects=1, num_frames=3))
    assert found.measures == []
    assert [one.what for one in left_out] == [f"inside the holes, {label}" for label in FILLS.values()]
    assert left_out[0].reason.startswith("3 images of 1 subjects, at least 2 of 2 are needed: the others of 3 repaired")
    table = table_of()
    table.loc[:, [column("biharmonic", measure) for measure in IN_HOLE]] = np.nan
    found, left_out = completion(table)
    assert [one.what for one in left_out] == ["inside the holes, biharmonic"]
    assert "0 images of 0 subjects" in left_out[0].reason
    assert "have nothing to fill their holes with in this way" in left_out[0].reason
    assert found.measure("biharmonic", "ssim") is None
    table[IS_OWN] = 1.0
    table.loc[:, [column(fill, measure) for fill in FILLS for measure in IN_HOLE]] = np.nan
    assert "of 13 of 12 repaired" not in completion(table)[1][0].reason
    assert "nobody knows what the hole hides" in completion(table)[1][0].reason
