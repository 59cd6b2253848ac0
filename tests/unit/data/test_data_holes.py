"""Holes: each is a pure function of seed, key and variant, lies in the frame, hides something, and survives a cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.random import default_rng

from ccmdist.ccm.structure import structure_picture
from ccmdist.config.data import HoleSettings
from ccmdist.data.holes import (
    HOLE_GREY,
    SHAPES,
    hole,
    hole_tokens,
    holed_image,
    holes_of,
    layout_of,
    packed,
    unpacked,
)
from ccmdist.data.phantom_shards import sample
from ccmdist.data.views import flipped, resized
from ccmdist.diffusion.flow import pack_latents

seeds = st.integers(0, 2**64 - 1)
sizes = st.integers(2, 24).map(lambda tokens: 16 * tokens)
FRACTIONS = {
    "rectangle": (0.03, 0.30),
    "stroke": (0.02, 0.25),
    "band": (0.03, 0.25),
    "quadrant": (0.25, 0.25),
    "everything": (1.0, 1.0),
}


@pytest.fixture(scope="module")
def triple():
    return sample(0, "Control", 0, 0, 64)


@given(st.sampled_from(sorted(SHAPES)), sizes, seeds)
def test_every_hole_hides_a_sensible_part_of_the_frame(shape_name, size_px, seed):
    drawn = hole(shape_name, size_px, default_rng(seed))
    assert (drawn.shape, drawn.dtype) == ((size_px, size_px), np.bool_)
    low, high = FRACTIONS[shape_name]
    assert low <= drawn.mean() <= high
    np.testing.assert_array_equal(drawn, hole(shape_name, size_px, default_rng(seed)))


@given(st.sampled_from(sorted(SHAPES)), seeds)
def test_a_hole_is_the_same_at_every_size_of_the_run(shape_name, seed):
    large, small = (hole(shape_name, size_px, default_rng(seed)) for size_px in (256, 64))
    shares = large.reshape(64, 4, 64, 4).mean(axis=(1, 3))
    # Pixels at the rim of a hole are half in it.
    assert np.abs(shares - small).mean() < 0.03


@given(seeds)
def test_a_band_crosses_the_frame(seed):
    band = hole("band", 128, default_rng(seed))
    rim = np.concatenate([band[0], band[-1], band[:, 0], band[:, -1]])
    assert rim.any()
    rows, columns = np.nonzero(band)
    assert max(np.ptp(rows), np.ptp(columns)) > 64


@given(seeds)
def test_a_stroke_is_one_piece(seed):
    from scipy.ndimage import label

    assert label(hole("stroke", 96, default_rng(seed)), np.ones((3, 3)))[1] == 1


@given(st.integers(0, 2**31), st.text("abc_-01", min_size=1, max_size=12), st.integers(1, 6), st.data())
def test_holes_depend_on_seed_key_and_variant_alone(triple, seed, key, per_sample, data):
    triple = replace(triple, key=key)
    holes = holes_of(triple, HoleSettings(seed=seed, per_sample=per_sample), 64)
    assert holes.shape == (per_sample, 64, 64)
    assert holes.any(axis=(1, 2)).all()
    fewer = data.draw(st.integers(1, per_sample))
    other = replace(triple, image=triple.image[::-1], nerve_mask=~triple.nerve_mask)
    np.testing.assert_array_equal(holes_of(other, HoleSettings(seed=seed, per_sample=fewer), 64), holes[:fewer])


def test_keys_seeds_and_variants_have_holes_of_their_own_of_every_shape(triple):
    many = HoleSettings(per_sample=64)
    holes = holes_of(triple, many, 64)
    assert len(np.unique(packed(holes).reshape(64, -1), axis=0)) > 35, "quadrants and the whole frame are few"
    for other in (
        holes_of(replace(triple, key="another"), many, 64),
        holes_of(triple, HoleSettings(per_sample=64, seed=1), 64),
    ):
        assert (holes != other).any(axis=(1, 2)).mean() > 0.8
    only = holes_of(triple, HoleSettings(shapes=("quadrant",), per_sample=8), 64)
    assert (only.mean(axis=(1, 2)) == 0.25).all()
    everything = holes.all(axis=(1, 2)).mean()
    assert 0.05 < everything < 0.4, "a fifth of them, drawn equally often"


def test_a_sample_keeps_the_hole_that_it_brings_and_flips_turn_it_with_the_frame(triple):
    own = np.zeros((64, 64), bool)
    own[5:9, 40:60] = True
    triple = replace(triple, inpaint_mask=own)
    holes = holes_of(triple, HoleSettings(per_sample=3), 64)
    np.testing.assert_array_equal(holes, np.stack([own] * 3))
    turned = holes_of(flipped(triple, "hflip"), HoleSettings(per_sample=1), 64)
    np.testing.assert_array_equal(turned[0], own[:, ::-1])
    large = holes_of(triple, HoleSettings(per_sample=1), 128)
    np.testing.assert_array_equal(large, holes_of(resized(triple, 128), HoleSettings(per_sample=1), 128))


@given(arrays(np.bool_, array_shapes(min_dims=2, max_dims=4, max_side=20)))
def test_packed_holes_come_back(holes):
    stored = torch.from_numpy(packed(holes))
    assert stored.shape == (*holes.shape[:-1], -(-holes.shape[-1] // 8))
    found = unpacked(stored, holes.shape[-1])
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), holes)


@given(st.integers(1, 4), st.integers(1, 5), seeds, st.sampled_from([0.0, 0.002, 0.02, 0.5, 1.0]))
def test_a_token_belongs_to_a_hole_if_any_of_its_pixels_does(rows, columns, seed, density):
    holes = default_rng(seed).random((2, 16 * rows, 16 * columns)) < density
    found = hole_tokens(torch.from_numpy(holes))
    slow = [
        [
            one[16 * down : 16 * down + 16, 16 * right : 16 * right + 16].any()
            for down in range(rows)
            for right in range(columns)
        ]
        for one in holes
    ]
    np.testing.assert_array_equal(found.numpy(), np.array(slow))
    # In the order in which latents are packed: a latent is 8 x 8 px.
    latents = torch.nn.functional.max_pool2d(torch.from_numpy(holes).float()[:, None], 8)
    assert torch.equal(pack_latents(latents).amax(dim=-1) > 0, found)


def test_what_a_hole_hides_is_grey_and_all_else_keeps_its_bytes(triple):
    holes = holes_of(triple, HoleSettings(), 64)
    images = holed_image(triple.image, holes)
    assert (images.shape, images.dtype) == ((4, 64, 64), np.uint8)
    assert (images[holes] == HOLE_GREY).all()
    assert all((image[~one] == triple.image[~one]).all() for image, one in zip(images, holes, strict=True))


def test_the_layout_is_the_share_of_each_token_that_the_structure_covers():
    mask = np.zeros((32, 48), bool)
    mask[:16, :16], mask[16:20, 32:48] = True, True
    expected = np.array([[255, 0, 0], [0, 0, 64]], np.uint8)
    np.testing.assert_array_equal(layout_of(structure_picture(mask, None, "mask")), expected)
    coloured = np.zeros((32, 48, 3), np.uint8)
    coloured[mask] = (0, 160, 255)
    np.testing.assert_array_equal(layout_of(coloured), expected)
