"""Whose mask stands in for an image's own, and what that gives."""

import numpy as np
import pytest

from ccmdist.ccm.overlap import centreline_dice, dice
from ccmdist.ccm.phantom import make_nerves
from ccmdist.evaluation.biomarkers.chance import Nerves, with_other_masks


def nerves(key, subject, source, seed=0):
    mask = make_nerves("Control", seed, 96).nerve_mask
    return Nerves.packed(key, subject, source, mask, mask)


def test_the_partner_is_the_next_image_of_another_subject_and_the_last_one_takes_the_first():
    shard = [nerves("a1", "a", "a1"), nerves("a2", "a", "a2"), nerves("b1", "b", "b1"), nerves("b2", "b", "b2")]
    assert [row["partner_key"] for row in with_other_masks(shard)] == ["b1", "b1", "a1", "a1"]


def test_within_one_subject_the_partner_has_another_mask():
    shard = [nerves("x-0", "a", "x"), nerves("x-1", "a", "x"), nerves("y-0", "a", "y")]
    assert [row["partner_key"] for row in with_other_masks(shard)] == ["y-0", "y-0", "x-0"]


def test_images_of_one_mask_have_no_partner():
    rows = list(with_other_masks([nerves("x-0", "a", "x"), nerves("x-1", "a", "x")]))
    assert [row["partner_key"] for row in rows] == ["", ""]
    assert all(np.isnan(row["chance_dice"]) and np.isnan(row["chance_cldice"]) for row in rows)


def test_overlap_by_chance_is_that_of_found_nerves_with_the_partners_mask():
    first, second = (make_nerves("Control", seed, 97).nerve_mask[:, :90] for seed in (1, 2))
    shard = [Nerves.packed("a", "a", "a", first, second), Nerves.packed("b", "b", "b", second, first)]
    rows = list(with_other_masks(shard))
    # Found and wanted are swapped in the partner, so each meets itself.
    assert [row["chance_dice"] for row in rows] == [1, 1]
    plain = [Nerves.packed("a", "a", "a", first, first), Nerves.packed("b", "b", "b", second, second)]
    row = next(with_other_masks(plain))
    assert row["chance_dice"] == pytest.approx(dice(first, second))
    assert row["chance_cldice"] == pytest.approx(centreline_dice(first, second))
    assert row["chance_dice"] < 0.4
