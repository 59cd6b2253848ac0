"""What stands for the nerves is a picture: the mask as ever, or one disc for each point, wherever it lies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.ccm.phantom import make_nerves, make_phantom
from ccmdist.ccm.structure import (
    BRANCH_POINT,
    COLOURS,
    DENDRITIC_CELL,
    END_POINT,
    POINT_CODES,
    points_of_mask,
    structure_picture,
)

FLIPS = (np.fliplr, np.flipud, lambda frame: np.flipud(np.fliplr(frame)))


def line(canvas, start, stop, width=3):
    num = 4 * len(canvas)
    for row, column in zip(np.linspace(start[0], stop[0], num), np.linspace(start[1], stop[1], num), strict=True):
        at = slice(max(round(row) - width // 2, 0), round(row) + width // 2 + 1)
        canvas[at, max(round(column) - width // 2, 0) : round(column) + width // 2 + 1] = True
    return canvas


def places(points, code):
    return sorted(zip(*(at.tolist() for at in np.nonzero(points == code)), strict=True))


def near(found, expected, within_px):
    distances = np.abs(np.array(found)[:, None] - np.array(expected)).max(axis=-1)
    return len(found) == len(expected) and (distances.min(axis=0) <= within_px).all()


def test_a_mask_is_shown_as_the_pixels_that_it_always_was():
    mask = make_nerves("Control", 1, 128).nerve_mask
    picture = structure_picture(mask, None, "mask")
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(structure_picture(mask, np.ones(mask.shape, np.uint8), "mask"), picture)


def test_a_fork_has_one_branch_point_and_three_ends():
    mask = np.zeros((128, 128), bool)
    for tip in ((20, 64), (100, 30), (100, 98)):
        line(mask, (64, 64), tip)
    points = points_of_mask(mask)
    assert near(places(points, BRANCH_POINT), [(64, 64)], 3)
    assert near(places(points, END_POINT), [(20, 64), (100, 30), (100, 98)], 3)
    assert not (points == DENDRITIC_CELL).any()


@pytest.mark.parametrize("gap_px", [0, 2])
def test_a_nerve_that_leaves_the_frame_does_not_end_there(gap_px):
    mask = line(np.zeros((128, 128), bool), (gap_px, 40), (80, 60))
    assert near(places(points_of_mask(mask), END_POINT), [(80, 60)], 3)
    across = line(np.zeros((128, 128), bool), (0, 20), (127, 90))
    assert not points_of_mask(across).any()


def test_a_crossing_is_one_branch_point_and_no_mask_is_no_point():
    crossing = line(line(np.zeros((128, 128), bool), (0, 0), (127, 127)), (127, 0), (0, 127))
    assert near(places(points_of_mask(crossing), BRANCH_POINT), [(64, 64)], 4)
    empty = np.zeros((64, 64), bool)
    assert not points_of_mask(empty).any()
    assert not structure_picture(empty, None, "mask_and_points").any()


@pytest.mark.parametrize("structure", ["points", "mask_and_points"])
def test_each_class_has_a_disc_of_its_own_colour_before_what_the_structure_asks_for(structure):
    mask = line(np.zeros((128, 128), bool), (0, 64), (127, 64))
    points = np.zeros((128, 128), np.uint8)
    points[20, 64], points[64, 64], points[100, 20] = BRANCH_POINT, END_POINT, DENDRITIC_CELL
    picture = structure_picture(mask, points, structure)
    assert (picture.shape, picture.dtype) == ((128, 128, 3), np.uint8)
    for code, place in ((BRANCH_POINT, (20, 64)), (END_POINT, (64, 64)), (DENDRITIC_CELL, (100, 20))):
        assert tuple(picture[place]) == COLOURS[code]
        assert (picture == COLOURS[code]).all(axis=2).sum() == 37  # pixels within 3.5 px
    assert tuple(picture[110, 64]) == ((255,) * 3 if structure == "mask_and_points" else (0,) * 3)


def test_colours_are_far_from_each_other_from_black_and_from_white():
    colours = np.array([*COLOURS.values(), (0, 0, 0), (255, 255, 255)], float)
    assert set(COLOURS) == set(POINT_CODES) - {0}
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1)[~np.eye(len(colours), dtype=bool)]
    assert distances.min() > 150
    assert np.diff(np.sort(colours.mean(axis=1))).min() > 15, "they differ in grey too"


@pytest.mark.parametrize(("size_px", "radius_px"), [(64, 3), (128, 3), (384, 4), (768, 8)])
def test_discs_grow_with_the_frame_and_fill_a_good_part_of_a_patch_wherever_they_lie(size_px, radius_px):
    mask = np.zeros((size_px, size_px), bool)
    for down in range(8):
        points = np.zeros(mask.shape, np.uint8)
        points[32 + down, 32] = END_POINT
        seen = structure_picture(mask, points, "points").any(axis=2)
        rows, columns = np.nonzero(seen)
        assert np.ptp(rows) == np.ptp(columns) == 2 * radius_px
        for right in range(8):
            patches = np.roll(seen, right, axis=1).reshape(size_px // 8, 8, size_px // 8, 8)
            # In the worst place a disc lies on the corner of four patches.
            assert patches.sum(axis=(1, 3)).max() >= 12


def test_where_discs_overlap_each_is_seen_up_to_the_middle():
    points = np.zeros((128, 128), np.uint8)
    points[60, 60], points[60, 63] = BRANCH_POINT, END_POINT
    picture = structure_picture(np.zeros(points.shape, bool), points, "points")
    assert tuple(picture[60, 61]) == COLOURS[BRANCH_POINT]
    assert tuple(picture[60, 62]) == COLOURS[END_POINT]


@given(st.integers(0, 2**32), st.sampled_from(["points", "mask_and_points"]), st.integers(8, 90))
def test_the_picture_of_flipped_points_is_the_flipped_picture(seed, structure, size_px):
    rng = np.random.default_rng(seed)
    mask = rng.random((size_px, size_px)) > 0.8
    points = rng.choice(POINT_CODES, (size_px, size_px), p=[0.97, 0.01, 0.01, 0.01]).astype(np.uint8)
    picture = structure_picture(mask, points, structure)
    for flip in FLIPS:
        np.testing.assert_array_equal(structure_picture(flip(mask), flip(points), structure), flip(picture))


@pytest.mark.parametrize(("group", "seed"), [("Control", 3), ("T1NoDPN", 5), ("T1DPN", 7)])
def test_a_phantom_knows_its_points(group, seed):
    phantom, nerves = make_phantom(group, seed, 256), make_nerves(group, seed, 256)
    # Of a fork, the first point of the path is where it leaves; of a thin fibre, neither.
    kinds = {"fork": ([0], [-1]), "connection": ([0, -1], []), "loop": ([0, -1], []), "thin": ([], [0, -1])}
    for code, which in ((BRANCH_POINT, 0), (END_POINT, 1)):
        ends_um = [fibre.path_um[kinds.get(fibre.kind, ([], []))[which]] for fibre in nerves.fibres]
        inside = [tuple(place) for place in np.concatenate(ends_um) / (400 / 384) if (place >= 0).all()]
        expected = {(int(row), int(column)) for row, column in inside if max(row, column) < 256}
        found = set(places(phantom.points, code))
        assert found
        # Two of them may share a pixel, and a cell may lie on it.
        assert found <= expected
        assert len(found) >= len(expected) - 2
    on_nerve = np.isin(phantom.points, (BRANCH_POINT, END_POINT))
    assert phantom.nerve_mask[on_nerve].all()


def test_dendritic_cells_of_a_phantom_lie_where_the_image_is_bright():
    brighter = []
    for seed in range(6):
        phantom = make_phantom("T1DPN", seed, 256)
        for row, column in places(phantom.points, DENDRITIC_CELL):
            around = phantom.image[max(row - 3, 0) : row + 4, max(column - 3, 0) : column + 4]
            brighter.append(around.max() > np.quantile(phantom.image, 0.98))
    assert len(brighter) > 3
    assert np.mean(brighter) > 0.8
