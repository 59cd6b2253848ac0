"""Overlap, centrelines, offsets and agreement on cases with a known answer."""

import numpy as np
import pytest

from ccmdist.ccm.phantom import make_nerves
from ccmdist.evaluation.biomarkers.adherence import absolute_agreement, centreline_dice, dice, offset_px

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


def test_agreement_is_that_of_the_mean_squares():
    # Judges 1 and 2 of the example of Shrout and Fleiss 1979.
    first, second = np.array([9.0, 6, 8, 7, 10, 6]), np.array([2.0, 1, 4, 1, 5, 2])
    values = np.stack([first, second], axis=1)
    grand = values.mean()
    rows = 2 * ((values.mean(axis=1) - grand) ** 2).sum() / 5
    columns = 6 * ((values.mean(axis=0) - grand) ** 2).sum() / 1
    error = ((values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + grand) ** 2).sum() / 5
    by_hand = (rows - error) / (rows + error + 2 * (columns - error) / 6)
    assert absolute_agreement(first, second) == pytest.approx(by_hand)


def test_agreement_is_one_for_equal_values_and_falls_with_a_bias():
    values = np.arange(10.0)
    assert absolute_agreement(values, values) == pytest.approx(1)
    assert absolute_agreement(values, values + 5) < 0.5
    assert np.isnan(absolute_agreement(values[:2], values[:2]))
    assert absolute_agreement(np.append(values, np.nan), np.append(values, 3.0)) == pytest.approx(1)
