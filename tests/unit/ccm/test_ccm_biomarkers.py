"""Known answers: lines, circles, forks and crossings have the biomarkers that they were drawn with."""

from dataclasses import astuple, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.ccm.biomarkers import QUANTITIES, Biomarkers, biomarkers, box_dimension, tortuosity_coefficient
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_nerves
from ccmdist.ccm.skeleton import nerve_graph, pruned

SIZE_PX = 300
AREA_MM2 = 0.09
ROWS, COLUMNS = np.mgrid[:SIZE_PX, :SIZE_PX]
NOTHING = np.zeros((SIZE_PX, SIZE_PX), bool)


def stroke(start, stop, radius_px=1.4):
    """A straight nerve with round ends."""
    start, stop = np.array(start, float), np.array(stop, float)
    length_px = np.hypot(*(stop - start))
    along = (stop - start) / length_px
    run = np.clip((ROWS - start[0]) * along[0] + (COLUMNS - start[1]) * along[1], 0, length_px)
    return np.hypot(ROWS - start[0] - run * along[0], COLUMNS - start[1] - run * along[1]) <= radius_px


def length_px(nerve_mask):
    return nerve_graph(nerve_mask).length_px


@pytest.mark.parametrize("radius_px", [1.0, 1.4, 2.0, 2.5])
def test_a_straight_line_of_any_angle_has_its_length_within_one_per_cent(radius_px):
    for angle_deg in range(0, 180, 5):
        along = 100 * np.array([np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))])
        found_px = length_px(stroke(150 - along, 150 + along, radius_px))
        assert found_px == pytest.approx(200, rel=0.01), angle_deg


@pytest.mark.parametrize("angle_deg", range(0, 180, 20))
def test_a_nerve_that_crosses_the_frame_has_the_length_that_lies_within_it(angle_deg):
    across = np.array([np.sin(np.deg2rad(angle_deg)), np.cos(np.deg2rad(angle_deg))])
    middle = (SIZE_PX - 1) / 2
    line = stroke(middle - SIZE_PX * across, middle + SIZE_PX * across)
    assert length_px(line) == pytest.approx(SIZE_PX / np.abs(across).max(), rel=0.01)


def test_skans_chain_code_alone_reads_lines_of_all_angles_several_per_cent_long():
    angles = np.deg2rad(np.arange(0, 180, 5))
    lines = [stroke(150 - along, 150 + along) for along in 100 * np.stack([np.sin(angles), np.cos(angles)], axis=1)]
    lengths = np.array([[graph.length_px, graph.chain_code_px] for graph in map(nerve_graph, lines)]) / 200 - 1
    assert abs(lengths[:, 0].mean()) < 0.005
    # Over all angles 4 / pi (sin 45 + (sqrt 2 - 1) (1 - cos 45)) = 1.0548.
    assert lengths[:, 1].mean() == pytest.approx(0.055, abs=0.01)


def test_the_chain_code_reads_slanted_lines_too_long_and_stands_beside_the_length():
    measured = biomarkers(stroke((100, 50), (100 + 200 * np.tan(np.pi / 8), 250)), 1.0)
    assert measured.cnfl_chain_code / measured.cnfl == pytest.approx(1.0824, abs=0.01)


@pytest.mark.parametrize("radius_px", [20, 40, 80])
def test_a_circle_has_its_length_within_one_per_cent_and_no_ends(radius_px):
    ring = np.abs(np.hypot(ROWS - 150, COLUMNS - 150) - radius_px) <= 1.5
    assert length_px(ring) == pytest.approx(2 * np.pi * radius_px, rel=0.01)
    measured = biomarkers(ring, 1.0)
    assert (measured.ctbd, measured.cnfd) == (0, 0)
    assert np.isnan(measured.tortuosity)


def test_an_arc_has_its_length_within_one_per_cent():
    arc = (np.abs(np.hypot(ROWS - 150, COLUMNS - 150) - 100) <= 1.5) & (ROWS <= 150)
    round_ends = stroke((150, 50), (151, 50)) | stroke((150, 250), (151, 250))
    assert length_px(arc | round_ends) == pytest.approx(100 * np.pi + 2, rel=0.01)


def test_a_fork_is_one_branch_point_on_one_main_nerve():
    fork = stroke((150, 150), (0, 150)) | stroke((150, 150), (299, 60)) | stroke((150, 150), (299, 240))
    measured = biomarkers(fork, 1.0)
    assert [measured.cnfd, measured.cnbd, measured.ctbd] == pytest.approx([1 / AREA_MM2] * 3)
    assert measured.cnfl == pytest.approx(0.001 * (150 + 2 * np.hypot(149, 90)) / AREA_MM2, rel=0.015)


@pytest.mark.parametrize("slant", [0, 40, 100])
def test_a_crossing_is_two_main_nerves_and_one_branch_point(slant):
    crossing = stroke((0, 150 - slant), (299, 150 + slant)) | stroke((150, 0), (150, 299))
    measured = biomarkers(crossing, 1.0)
    assert [measured.cnfd, measured.cnbd, measured.ctbd] == pytest.approx([2 / AREA_MM2, 1 / AREA_MM2, 1 / AREA_MM2])


def test_of_two_ways_that_overlap_the_straighter_is_the_main_nerve():
    trunk = stroke((0, 150), (150, 150)) | stroke((150, 150), (299, 150))
    detour = stroke((150, 150), (299, 290))
    measured = biomarkers(trunk | detour, 1.0)
    assert measured.cnfd == pytest.approx(1 / AREA_MM2)
    assert measured.tortuosity < 0.05


@pytest.mark.parametrize(
    ("start", "stop", "num"),
    [
        ((0, 100), (299, 100), 1),
        ((13, 100), (286, 100), 1),
        ((30, 100), (299, 100), 0),  # begins too far from the border
        ((0, 100), (100, 0), 0),  # cuts off a corner: too short a chord
        ((0, 200), (200, 299), 1),
    ],
)
def test_a_main_nerve_goes_from_border_to_border_over_half_the_edge(start, stop, num):
    assert biomarkers(stroke(start, stop), 1.0).cnfd == pytest.approx(num / AREA_MM2)


@pytest.mark.parametrize("radius_px", [1.5, 2.5, 3.5])
def test_the_width_of_a_line_is_its_area_over_its_length(radius_px):
    line = np.abs(ROWS - 150.0) <= radius_px - 0.5
    assert biomarkers(line, 1.0).cnfw_um == pytest.approx(2 * radius_px, rel=0.04)


def test_lengths_go_with_the_pixel_and_densities_against_it():
    mask = stroke((0, 40), (299, 200)) | stroke((20, 200), (200, 20))
    small, large = biomarkers(mask, 1.0), biomarkers(mask, 2.0)
    assert (large.cnfl, large.cnfl_chain_code) == (small.cnfl / 2, small.cnfl_chain_code / 2)
    assert (large.cnfd, large.cnbd, large.ctbd) == (small.cnfd / 4, small.cnbd / 4, small.ctbd / 4)
    assert large.cnfw_um == small.cnfw_um * 2
    assert (large.cnfa, large.cnfrd) == (small.cnfa, small.cnfrd)


def test_an_empty_mask_has_zero_densities_and_neither_width_nor_dimension_nor_tortuosity():
    measured = biomarkers(NOTHING, 1.0)
    densities = ("cnfd", "cnbd", "cnfl", "cnfl_chain_code", "ctbd", "cnfa")
    assert all(getattr(measured, name) == 0 for name in densities)
    assert all(np.isnan(getattr(measured, f.name)) for f in fields(Biomarkers) if f.name not in densities)


def test_dust_is_no_nerve():
    speck = NOTHING.copy()
    speck[100:103, 100:103] = True
    assert biomarkers(speck, 1.0).cnfl == 0
    line = stroke((0, 40), (299, 200))
    assert biomarkers(line | speck, 1.0).cnfw_um == pytest.approx(biomarkers(line, 1.0).cnfw_um)


def test_a_full_frame_has_area_one_and_dimension_two():
    measured = biomarkers(np.ones((128, 128), bool), 1.0)
    assert measured.cnfa == 1
    assert measured.cnfrd == pytest.approx(2)
    assert np.isfinite(measured.cnfl)


def test_the_box_dimension_of_a_line_is_one():
    line = np.zeros((256, 256), bool)
    line[128] = True
    assert box_dimension(line) == pytest.approx(1, abs=1e-9)


def test_tortuosity_is_zero_for_a_line_and_that_of_a_sine_for_a_sine():
    x_um = np.arange(0, 400.0)
    line = np.stack([0.7 * x_um, x_um], axis=1)
    assert tortuosity_coefficient(line) == pytest.approx(0, abs=1e-9)
    wave = 2 * np.pi / 200
    sine = np.stack([10 * np.sin(wave * x_um), x_um], axis=1)
    expected = np.sqrt(0.5 * ((10 * wave) ** 2 + (10 * 10 * wave**2) ** 2))
    assert tortuosity_coefficient(sine) == pytest.approx(expected, rel=0.05)
    assert tortuosity_coefficient(sine[::-1]) == pytest.approx(tortuosity_coefficient(sine), rel=0.01)


@pytest.mark.parametrize("half_px", [40, 60, 100])
def test_a_piece_inside_a_crossing_belongs_to_both_nerves(half_px):
    flat = stroke((0, 150 - half_px), (299, 150 + half_px)) | stroke((0, 150 + half_px), (299, 150 - half_px))
    graph = nerve_graph(flat)
    (inner,) = (branch for branch in graph.branches if branch.nodes[0] == branch.nodes[1])
    assert inner.num_nerves == 2
    assert graph.length_px == pytest.approx(sum(branch.length_px for branch in graph.branches) + inner.length_px)
    assert graph.length_px == pytest.approx(2 * np.hypot(300, 2 * half_px * 300 / 299), rel=0.006)


def test_a_spur_is_pruned_and_a_branch_is_not():
    trunk = NOTHING.copy()
    trunk[150, 20:280] = True
    spur, branch = trunk.copy(), trunk.copy()
    spur[146:150, 100] = True
    branch[130:150, 100] = True
    assert pruned(spur, 5).sum() == pytest.approx(trunk.sum(), abs=1)
    assert pruned(branch, 5).sum() == branch.sum()


def test_constructed_biomarkers_of_phantoms_are_found_in_their_masks():
    nerves = [make_nerves(group, seed, 384) for group in CLINICAL_GROUPS for seed in range(8)]
    found = [biomarkers(one.nerve_mask, 400 / 384) for one in nerves]

    def correlation(name):
        return np.corrcoef([one.labels[name] for one in nerves], [getattr(one, name) for one in found])[0, 1]

    assert correlation("cnfl") >= 0.995
    assert correlation("cnfd") >= 0.8
    assert correlation("cnbd") >= 0.7  # where fibres touch, the mask has branch points that were not constructed
    assert all(one.cnfa == pytest.approx(nerve.labels["cnfa"]) for one, nerve in zip(found, nerves, strict=True))


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), view=st.sampled_from(["hflip", "vflip", "rot180"]), width_px=st.integers(90, 128))
def test_mirror_images_have_the_same_biomarkers(seed, view, width_px):
    mask = make_nerves("Control", seed, 128).nerve_mask[:, :width_px]
    other = {"hflip": mask[:, ::-1], "vflip": mask[::-1], "rot180": mask[::-1, ::-1]}[view]
    assert astuple(biomarkers(mask, 1.0)) == pytest.approx(astuple(biomarkers(other, 1.0)), rel=1e-12, nan_ok=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), density=st.floats(0, 1), height=st.integers(1, 40), width=st.integers(1, 40))
def test_any_mask_has_biomarkers(seed, density, height, width):
    mask = np.random.default_rng(seed).random((height, width)) < density
    measured = biomarkers(mask, 1.0)
    assert measured.cnfl >= 0
    assert measured.cnbd <= measured.ctbd + 1e-9
    assert np.isnan(measured.cnfw_um) == (measured.cnfl == 0)


def test_every_quantity_names_a_field():
    assert {quantity.field for quantity in QUANTITIES.values()} | {"cnfl_chain_code"} == {
        f.name for f in fields(Biomarkers)
    }


@pytest.mark.parametrize(
    ("mask", "um_per_px", "message"),
    [
        (NOTHING.astype(np.uint8), 1.0, r"nerve mask has dtype uint8 and shape \(300, 300\), expected bool"),
        (NOTHING[None], 1.0, "expected bool of shape"),
        (NOTHING, 0.0, "um_per_px is 0.0, expected a positive number"),
        (NOTHING, float("nan"), "um_per_px is nan"),
    ],
)
def test_what_is_no_mask_or_no_pixel_size_is_refused(mask, um_per_px, message):
    with pytest.raises(ValueError, match=message):
        biomarkers(mask, um_per_px)
