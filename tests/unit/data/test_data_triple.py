"""A sample survives its members bit for bit, and nothing but a well-formed sample gets in or out."""

import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.data.triple import (
    REQUIRED,
    Triple,
    TripleMeta,
    check_key,
    is_marked_synthetic,
    members_of,
    prompt_for,
    triple_of,
)
from ccmdist.errors import ShardError
from ccmdist.models.encoders import grey_of_rgb, rgb_of_grey


def meta(clinical_group="Control", eye="OD", fields=None, **changes):
    fields = fields or {}
    values = {"subject": "s1", "um_per_px": 1.04, "source": "folders"} | changes
    prompt = values.pop("prompt", prompt_for(clinical_group, eye, fields))
    return TripleMeta(prompt=prompt, clinical_group=clinical_group, eye=eye, fields=fields, **values)


def triple(key="k1", **changes):
    rng = np.random.default_rng(0)
    image, mask = rng.integers(0, 256, (8, 8), dtype=np.uint8), rng.random((8, 8)) > 0.8
    return Triple(key, image, mask, meta(**changes))


def png(pixels, mode=None, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode or "L").save(buffer, "PNG", **options)
    return buffer.getvalue()


keys = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=64)
metas = st.builds(
    meta,
    clinical_group=st.sampled_from([*CLINICAL_GROUPS, None]),
    eye=st.sampled_from(["OD", "OS", None]),
    fields=st.fixed_dictionaries({}, optional={"layer": st.just("subbasal"), "region": st.just("central")}),
    subject=keys,
    um_per_px=st.floats(1e-3, 1e3),
    source=st.sampled_from(["phantom", "folders"]),
    labels=st.dictionaries(keys, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
)
shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
frames = shapes.flatmap(lambda shape: st.tuples(arrays(np.uint8, shape), arrays(np.bool_, shape)))


@given(keys, frames, metas)
def test_a_sample_comes_back_from_its_members_bit_for_bit(key, frame, about):
    members = members_of(Triple(key, *frame, about))
    assert tuple(members) == REQUIRED
    found = triple_of(key, members, "here")
    assert found.key == key
    assert found.meta == about
    assert found.image.dtype == np.uint8
    assert found.nerve_mask.dtype == np.bool_
    np.testing.assert_array_equal(found.image, frame[0])
    np.testing.assert_array_equal(found.nerve_mask, frame[1])
    assert members_of(found) == members


@given(arrays(np.uint8, (2, 3, 5)))
def test_grey_through_the_three_channels_of_the_model_and_back_is_the_same_grey(grey_BHW):
    rgb = rgb_of_grey(torch.from_numpy(grey_BHW))
    assert rgb.shape == (2, 3, 3, 5)
    assert torch.equal(rgb[:, 0], rgb[:, 1])
    assert torch.equal(rgb[:, 0], rgb[:, 2])
    np.testing.assert_array_equal(grey_of_rgb(rgb).numpy(), grey_BHW)


def test_members_are_eight_bit_grey_and_two_valued():
    members = members_of(triple())
    for name, values in (("image.png", None), ("mask.png", {0, 255})):
        with Image.open(io.BytesIO(members[name])) as image:
            assert (image.format, image.mode, image.info) == ("PNG", "L", {})
            assert values is None or set(np.unique(np.asarray(image))) == values


def test_a_synthetic_sample_is_marked_and_keeps_its_provenance():
    made = triple(source="synthetic", provenance={"seed": 7, "adapter": "ab" * 32})
    members = members_of(made)
    assert is_marked_synthetic(members["image.png"])
    assert not is_marked_synthetic(members["mask.png"])
    assert not is_marked_synthetic(members_of(triple())["image.png"])
    assert triple_of("k1", members, "here").meta.provenance == {"seed": 7, "adapter": "ab" * 32}


def test_a_mark_in_a_compressed_chunk_or_in_another_format_is_seen():
    xmp = "digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp, zip=True)
    data = png(np.zeros((4, 4), np.uint8), pnginfo=info)
    assert xmp.encode() not in data
    assert is_marked_synthetic(data)
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "JPEG", xmp=xmp.encode())
    assert is_marked_synthetic(buffer.getvalue())
    assert not is_marked_synthetic(b"no image at all")


def test_a_synthetic_sample_may_be_drawn_with_the_prompt_of_another_group_but_with_no_other_text():
    about = {"source": "synthetic", "provenance": {}}
    wrong = triple(prompt=prompt_for("T1DPN", "OD", {}), **about)
    assert triple_of("k1", members_of(wrong), "here").meta.clinical_group == "Control"
    with pytest.raises(ShardError, match="sample k1: json, prompt: is not the wording for its codes"):
        members_of(triple(prompt="a cornea", **about))


@pytest.mark.parametrize("key", ["", "A", "a b", "../a", "a/b", "a.b", "ä", "a\n", "a\0", "x" * 65])
def test_a_key_that_could_be_a_path_or_a_name_is_refused(key):
    with pytest.raises(ShardError, match=r"here: .* is not a key, expected at most 64 of a-z 0-9 _ -; pack the set"):
        check_key(key, "here")
    with pytest.raises(ShardError):
        members_of(triple(key))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "Jane Doe, 1970"}, "json, prompt: is not the wording for its codes, 'Turn this nerve mask"),
        ({"subject": "Jane Doe"}, "json, subject: 'Jane Doe' is not a key"),
        ({"um_per_px": 0.0}, "json, um_per_px: 0.0 is not a length"),
        ({"um_per_px": float("nan")}, "its fields cannot be written as JSON"),
        ({"source": "synthetic"}, "json, provenance: stands in synthetic samples, in each of them and in no other"),
        ({"provenance": {}}, "json, provenance: stands in synthetic samples"),
        ({"labels": {"cnfl": "long"}}, "json, labels.cnfl: Input should be a valid number"),
    ],
)
def test_a_sample_that_could_not_be_read_back_is_not_written(changes, message):
    with pytest.raises(ShardError) as error:
        members_of(triple(**changes))
    assert str(error.value).startswith(f"sample k1: {message}")


def test_a_frame_of_another_type_or_shape_is_not_written():
    good = triple()
    for wrong in (
        replace(good, image=good.image.astype(np.float32)),
        replace(good, nerve_mask=good.nerve_mask.astype(np.uint8)),
        replace(good, nerve_mask=good.nerve_mask[:4]),
        replace(good, image=good.image[None]),
    ):
        with pytest.raises(ShardError, match="expected uint8 and bool of one shape"):
            members_of(wrong)


def with_json(**changes):
    values = json.loads(members_of(triple())["json"]) | changes
    return {"json": json.dumps({name: value for name, value in values.items() if value is not ...}).encode()}


BOMB = png(np.zeros((1, 1), np.uint8))[:16] + (20000).to_bytes(4) * 2 + b"\x08\0\0\0\0"
BOMB = BOMB + zlib.crc32(BOMB[12:29]).to_bytes(4) + png(np.zeros((1, 1), np.uint8))[33:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask.png": None}, "mask.png is missing; make or copy the shard anew"),
        ({"image.png": None, "json": None}, "image.png and json is missing"),
        ({"pkl": b"cos\nsystem"}, "unknown member 'pkl', expected only image.png, mask.png, inpaint_mask.png"),
        ({"image.png": b"\x89PNG"}, "image.png is not a PNG that can be read"),
        ({"image.png": BOMB}, "image.png is not a PNG that can be read"),
        ({"image.png": png(np.zeros((8, 8), np.uint8), "RGB")}, "image.png is of mode RGB, expected 8-bit grey"),
        ({"image.png": png(np.zeros((8, 9), np.uint8))}, "image.png is 8x9 px and mask.png 8x8 px, expected one size"),
        ({"mask.png": png(np.full((8, 8), 1, np.uint8))}, "mask.png holds other values than 0 and 255"),
        ({"json": b"{"}, "json, as a whole: Invalid JSON"),
        (with_json(name="Jane"), "json, name: Unexpected keyword argument"),
        (with_json(subject=...), "json, subject: Field required"),
        (with_json(clinical_group="T1DNP"), "json, clinical_group: Input should be 'Control', 'T1NoDPN' or 'T1DPN'"),
        (with_json(eye="left"), "json, eye: Input should be 'OD' or 'OS'"),
        (with_json(fields={"note": "x"}), "json, prompt: field 'note' is not a known code"),
        (with_json(source="synthetic", provenance={}), "image.png and json disagree on whether it is synthetic"),
    ],
)
def test_a_member_that_is_not_what_it_should_be_is_named(changes, message):
    members = {name: data for name, data in (members_of(triple()) | changes).items() if data is not None}
    with pytest.raises(ShardError) as error:
        triple_of("k1", members, "train-000000.tar")
    assert str(error.value).startswith(f"train-000000.tar: sample k1: {message}")


def test_a_picture_above_the_pixel_cap_is_not_decoded():
    bomb = BOMB[:16] + (5000).to_bytes(4) * 2 + BOMB[24:29]
    bomb = bomb + zlib.crc32(bomb[12:29]).to_bytes(4) + BOMB[33:]
    with pytest.raises(ShardError, match=r"image.png has 25000000 pixels, expected at most 16777216"):
        triple_of("k1", members_of(triple()) | {"image.png": bomb}, "here")
