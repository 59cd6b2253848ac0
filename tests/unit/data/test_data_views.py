"""Views: the sample itself at the size of the run, and flips of it; thin nerves survive being shrunk."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.measure import label
from skimage.morphology import skeletonize

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.phantom import make_phantom
from ccmdist.ccm.prompts import FIELD_WORDS
from ccmdist.data.triple import EYES, OTHER_EYE, Triple, TripleMeta, prompt_for
from ccmdist.data.views import FLIPS, flipped, resized_image, resized_mask, views
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


def test_flips_follow_the_sample_under_their_own_keys(phantom):
    plain, *flipped = views(phantom, 64, ("hflip", "vflip", "rot180"), "here")
    assert [view.key for view in (plain, *flipped)] == ["k1", "k1-hflip", "k1-vflip", "k1-rot180"]
    np.testing.assert_array_equal(flipped[0].image, np.fliplr(plain.image))
    np.testing.assert_array_equal(flipped[1].nerve_mask, np.flipud(plain.nerve_mask))
    np.testing.assert_array_equal(flipped[2].image, np.rot90(plain.image, 2))
    assert all(view.image.flags.c_contiguous and view.nerve_mask.flags.c_contiguous for view in flipped)


def test_a_mirrored_view_is_of_the_other_eye_and_says_so_where_a_turned_one_is_not(phantom):
    found = {view.key: view.meta for view in views(phantom, 64, ("hflip", "vflip", "rot180"), "here")}
    other = replace(phantom.meta, eye="OS", prompt=prompt_for("Control", "OS", {}))
    assert found == {"k1": phantom.meta, "k1-hflip": other, "k1-vflip": other, "k1-rot180": phantom.meta}


codes = st.tuples(
    st.sampled_from([*CLINICAL_GROUPS, None]),
    st.sampled_from([*EYES, None]),
    st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(list(FIELD_WORDS[name])) for name in FIELD_WORDS if name != "eye"}
    ),
)


@given(codes, st.sampled_from([*CLINICAL_GROUPS, None]), st.lists(st.sampled_from(list(FLIPS)), max_size=6))
def test_flips_undo_themselves_in_the_prompt_too_and_an_even_number_of_mirrors_is_none(known, prompted, flips):
    group, eye, fields = known
    # The prompt of a synthetic sample may be that of another group than its own.
    meta = TripleMeta(prompt_for(prompted, eye, fields), group, "s1", eye, 1.0, "synthetic", fields, provenance={})
    frame = Triple("k1", np.arange(9, dtype=np.uint8).reshape(3, 3), np.zeros((3, 3), bool), meta)
    seen = frame
    for flip in flips:
        seen = flipped(seen, flip)
    num_mirrors = sum(flip != "rot180" for flip in flips)
    expected = OTHER_EYE[eye] if eye and num_mirrors % 2 else eye
    assert seen.meta == replace(meta, eye=expected, prompt=prompt_for(prompted, expected, fields))
    for flip in FLIPS:
        twice = flipped(flipped(seen, flip), flip)
        assert twice.meta == seen.meta
        np.testing.assert_array_equal(twice.image, seen.image)


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
