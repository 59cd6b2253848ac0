"""A table may name a hole and points of a frame: cropped with it, checked with it, and kept out of train if it is
to be repaired."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from ccmdist.data.folder_shards import default_key_file, describe_folder_set
from ccmdist.data.images import read_inpaint_mask
from ccmdist.data.manifest import read_manifest
from ccmdist.data.pseudonyms import Pseudonyms
from ccmdist.data.reader import read_shard, read_split
from ccmdist.errors import ShardError


def hole(shape=(48, 48)):
    pixels = np.zeros(shape, np.uint8)
    pixels[5:9, 10:40] = 255
    return pixels


def points(shape=(48, 48)):
    pixels = np.zeros(shape, np.uint8)
    pixels[7, 3], pixels[20, 30], pixels[40, 47] = 1, 2, 3
    return pixels


def bring(source, index=0, suffix="png", **files):
    """Give a row files; None leaves a cell blank."""
    for name, pixels in files.items():
        path = f"images/{name}_{index}.{suffix}"
        if pixels is not None:
            Image.fromarray(pixels).save(source.folder / path)
        source.rows[index] |= {name: path if pixels is not None else ""}
    return source


def packed(source):
    out = source.config().out
    return {triple.key: triple for shard in read_manifest(out).shards for triple in read_shard(out, shard)}


def test_a_hole_and_points_are_packed_with_their_frame(source):
    source.add("p1").add("p2").add("p3")
    bring(source, 0, inpaint_mask=hole(), points=points())
    bring(source, 1, inpaint_mask=None, points=points() * 0)
    source.pack(val_fraction=0, test_fraction=0)
    found = list(packed(source).values())
    assert sorted((t.inpaint_mask is not None, t.points is not None) for t in found) == [
        (False, False),
        (False, True),
        (True, True),
    ]
    (repaired,) = read_split(source.config().out, "test")
    np.testing.assert_array_equal(repaired.inpaint_mask, hole() == 255)
    np.testing.assert_array_equal(repaired.points, points())


def test_people_whose_frames_are_to_be_repaired_are_never_trained_on(source):
    source.add_cohort()
    bring(source, 0, inpaint_mask=hole())
    source.pack()
    out = source.config().out
    holes = {
        split: sum(t.inpaint_mask is not None for t in read_split(out, split)) for split in ("train", "val", "test")
    }
    assert holes == {"train": 0, "val": 0, "test": 1}
    of_test = {triple.meta.subject for triple in read_split(out, "test")}
    assert not of_test & {triple.meta.subject for triple in read_split(out, "train")}
    assert describe_folder_set(source.config()).endswith("; 1 with inpaint_mask")


def test_a_set_of_frames_to_be_repaired_alone_has_a_test_split_alone_and_it_is_said(source, logged):
    source.add("p1").add("p1").add("p2")
    for index in range(3):
        bring(source, index, inpaint_mask=hole())
    manifest = source.pack()
    assert {shard.split for shard in manifest.shards} == {"test"}
    assert "every subject has an inpaint_mask, so there is nobody to train on" in logged.text


def test_a_native_export_loses_its_footer_in_every_picture(source):
    source.add()
    native = np.random.default_rng(1).integers(0, 256, (484, 384), dtype=np.uint8)
    for name, pixels in (("image", native), ("mask", hole((484, 384)))):
        Image.fromarray(pixels).save(source.folder / source.rows[0][name])
    footed_hole, footed_points = hole((484, 384)), points((484, 384))
    footed_hole[400:], footed_points[450, 100] = 255, 3
    bring(source, 0, inpaint_mask=footed_hole, points=footed_points)
    source.pack(val_fraction=0, test_fraction=0)
    (triple,) = packed(source).values()
    np.testing.assert_array_equal(triple.image, native[:384])
    np.testing.assert_array_equal(triple.inpaint_mask, footed_hole[:384] == 255)
    np.testing.assert_array_equal(triple.points, footed_points[:384])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"points": np.zeros((32, 40), np.uint8)},
            "line 2: image is 48x48 px and points 40x32, expected one size; make the points from the frame as it is",
        ),
        ({"inpaint_mask": hole((32, 32))}, "line 2: image is 48x48 px and inpaint_mask 32x32, expected one size"),
        (
            {"inpaint_mask": hole() * 0},
            "line 2: inpaint_mask covers nothing; leave the cell blank where the whole frame is known",
        ),
        ({"inpaint_mask": np.full((48, 48), 99, np.uint8) + hole() // 3}, "line 2: inpaint_mask is no mask: it holds"),
        ({"points": points() * 80}, "line 2: points holds 240, expected only the codes 0 to 3; write one pixel for"),
    ],
)
def test_a_hole_or_points_that_do_not_fit_are_told_by_line(source, files, message):
    bring(source.add(), 0, **files)
    assert message in source.refusal()


def test_points_in_a_format_that_may_change_them_a_missing_file_and_one_file_for_two_are_told(source):
    source.add("p1").add("p2").add("p3")
    bring(source, 0, "jpg", points=points())
    source.rows[1] |= {"points": "images/none.png"}
    source.rows[2] |= {"inpaint_mask": source.rows[2]["mask"]}
    text = source.refusal()
    assert "line 2: points is no PNG; save it as grey PNG: other formats may change its codes" in text
    assert "line 3: points is a file that does not exist in the source folder" in text
    assert "line 4: mask and inpaint_mask are one file" in text


def test_points_make_another_source_and_a_row_without_optional_files_has_the_digest_that_it_always_had(source):
    source.add("p1")
    digest = source.pack().about["source_digest"]
    row = source.rows[0]
    hashes = b"".join(hashlib.sha256((source.folder / row[name]).read_bytes()).digest() for name in ("image", "mask"))
    table = hashlib.sha256((source.folder / "table.csv").read_bytes()).hexdigest()
    pseudonyms = Pseudonyms.read(default_key_file(source.config().out))
    assert digest == pseudonyms.digest(table, hashlib.sha256(hashes).hexdigest())
    bring(source, 0, points=points())
    with pytest.raises(ShardError, match="made with other source_digest"):
        source.pack()


def test_the_whole_frame_may_be_a_hole(tmp_path):
    for values in ((1,), (255,), (0, 1)):
        pixels = np.full((48, 48), values[0], np.uint8)
        pixels[0] = values[-1]
        Image.fromarray(pixels).save(tmp_path / "hole.png")
        found = read_inpaint_mask((tmp_path / "hole.png").read_bytes(), "here").pixels
        np.testing.assert_array_equal(found, pixels > 0)
