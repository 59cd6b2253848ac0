"""Views: the sample itself at the size of the run, and flips of it; thin nerves survive being shrunk."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.measure import label
from skimage.morphology import skeletonize

from ccmdist.ccm.phantom import make_phantom
from ccmdist.data.triple import Triple, TripleMeta, prompt_for
from ccmdist.data.views import FLIPS, resized_image, resized_mask, views
from ccmdist.errors import ShardError


def triple(image, nerve_mask):
    meta = TripleMeta(prompt_for("Control", "OD", {}), "Control", "s1", "OD", 1.0, "folders")
    return Triple("k1", image, nerve_mask, meta)


@pytest.fixture(scope="module")
def phantom():
    found = make_phantom("Control", 3, 128)
    return triple(found.image, found.nerve_mask)


def test_at_the_wanted_size_nothing_is_touched(phantom):
    (view,) = views(phantom, 128, (), "here")
    assert view.image is phantom.image
    assert view.nerve_mask is phantom.nerve_mask
    assert (view.key, view.meta) == (phantom.key, phantom.meta)


def test_flips_follow_the_sample_under_their_own_keys_and_keep_its_prompt(phantom):
    plain, *flipped = views(phantom, 64, ("hflip", "vflip", "rot180"), "here")
    assert [view.key for view in (plain, *flipped)] == ["k1", "k1-hflip", "k1-vflip", "k1-rot180"]
    assert all(view.meta == phantom.meta for view in flipped)
    np.testing.assert_array_equal(flipped[0].image, np.fliplr(plain.image))
    np.testing.assert_array_equal(flipped[1].nerve_mask, np.flipud(plain.nerve_mask))
    np.testing.assert_array_equal(flipped[2].image, np.rot90(plain.image, 2))
    assert all(view.image.flags.c_contiguous and view.nerve_mask.flags.c_contiguous for view in flipped)


def test_every_flip_undoes_itself():
    frame = np.arange(12).reshape(3, 4)
    for flip in FLIPS.values():
        np.testing.assert_array_equal(flip(flip(frame)), frame)
        assert not np.array_equal(flip(frame), frame)


def test_a_frame_that_is_no_square_is_refused_with_its_shard_and_key():
    wide = triple(np.zeros((8, 9), np.uint8), np.zeros((8, 9), bool))
    with pytest.raises(ShardError) as error:
        next(views(wide, 16, (), "train-000000.tar"))
    assert str(error.value) == ("train-000000.tar: sample k1 is 8x9 px, expected a square; crop it before packing")


@pytest.mark.parametrize("size_px", [48, 64, 96])
def test_a_shrunk_mask_loses_no_nerve_and_breaks_none(phantom, size_px):
    small = resized_mask(phantom.nerve_mask, size_px)
    assert small.dtype == np.bool_
    before, after = (label(mask, connectivity=2).max() for mask in (phantom.nerve_mask, small))
    # Fibres that lie closer than a pixel may merge; a break would make more pieces than there were.
    assert 1 <= after <= before
    rows, columns = np.nonzero(skeletonize(phantom.nerve_mask))
    assert small[rows * size_px // 128, columns * size_px // 128].all()


def test_a_line_of_one_pixel_survives_and_stays_a_line():
    mask = np.zeros((96, 96), bool)
    mask[np.arange(96), np.arange(96)] = True
    np.testing.assert_array_equal(resized_mask(mask, 32), np.eye(32, dtype=bool))


def test_a_thick_nerve_keeps_its_share_of_the_frame():
    mask = np.zeros((96, 96), bool)
    mask[24:48] = True
    assert resized_mask(mask, 32).mean() == mask.mean()


def test_an_enlarged_mask_is_copied_pixel_by_pixel():
    mask = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(resized_mask(mask, 6), np.kron(mask, np.ones((2, 2), bool)))


def test_a_shrunk_image_keeps_its_mean_and_has_no_aliases():
    stripes = np.tile(np.array([0, 255], np.uint8), (128, 64))
    small = resized_image(stripes, 32)
    assert small.dtype == np.uint8
    assert small[4:-4, 4:-4].std() < 3
    assert abs(small.mean() - 127.5) < 2


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 5))
def test_any_size_to_any_size_gives_that_size_and_an_empty_mask_stays_empty(edge_px, size_px, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((edge_px, edge_px)) > 0.7
    assert resized_mask(mask, size_px).shape == (size_px, size_px)
    assert resized_mask(mask, size_px).any() == mask.any()
    assert not resized_mask(np.zeros_like(mask), size_px).any()
    assert resized_image(mask.astype(np.uint8), size_px).shape == (size_px, size_px)
