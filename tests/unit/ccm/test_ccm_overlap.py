"""Overlap, centrelines and offsets on cases with a known answer."""

import numpy as np
import pytest

from ccmdist.ccm.overlap import centreline_dice, dice, offset_px
from ccmdist.ccm.phantom import make_nerves

NOTHING = np.zeros((64, 64), bool)


def bar(first_column, last_column, rows=slice(30, 33)):
    mask = NOTHING.copy()
    mask[rows, first_column:last_column] = True
    return mask


def test_dice_by_hand():
    whole, half, other = bar(0, 64), bar(0, 32), bar(0, 64, slice(10, 13))
    assert dice(whole, whole) == 1
    assert dice(whole, half) == pytest.approx(2 / 3)
    assert dice(whole, other) == 0
    assert dice(NOTHING, NOTHING) == 1
    assert dice(NOTHING, whole) == 0


def test_centreline_dice_by_hand():
    whole, half, other = bar(0, 64), bar(0, 32), bar(0, 64, slice(10, 13))
    assert centreline_dice(whole, whole) == 1
    assert centreline_dice(whole, other) == 0
    assert centreline_dice(NOTHING, NOTHING) == 1
    assert centreline_dice(NOTHING, whole) == 0
    # All of the half's centreline lies in the whole, and half of the whole's in the half: 2 * 1 * 0.5 / 1.5.
    assert centreline_dice(half, whole) == pytest.approx(2 / 3, abs=0.02)


def test_a_nerve_one_pixel_beside_its_place_costs_dice_and_not_centreline_dice():
    wanted, found = bar(0, 64), bar(0, 64, slice(31, 34))
    assert dice(found, wanted) == pytest.approx(2 / 3)
    assert centreline_dice(found, wanted) > 0.98


@pytest.mark.parametrize("moved", [(0, 0), (3, 0), (0, -5), (4, 7), (-6, 2)])
def test_the_offset_between_masks_is_found(moved):
    wanted = make_nerves("Control", 4, 160).nerve_mask[16:-16, 16:-16]
    down, right = moved
    found = make_nerves("Control", 4, 160).nerve_mask[16 - down : 144 - down, 16 - right : 144 - right]
    assert offset_px(found, wanted).tolist() == list(moved)


def test_an_offset_of_nothing_is_not_a_number():
    assert np.isnan(offset_px(NOTHING, bar(0, 64))).all()
