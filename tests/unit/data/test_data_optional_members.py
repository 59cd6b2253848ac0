"""Samples may bring a hole and points: they go wherever the sample goes, and samples without them stay as they were."""

import hashlib
import io
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import webdataset
from datasets import disable_progress_bars, load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ccmdist.config.data import DataSettings, FoldShardsConfig, PhantomShardsConfig
from ccmdist.config.loading import resolved
from ccmdist.data.audit import audit_set
from ccmdist.data.fold_shards import write_fold_set
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.phantom_shards import sample, write_phantom_set
from ccmdist.data.reader import read_shard, read_split, verify_set
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.triple import members_of, triple_of
from ccmdist.data.views import FLIPS, resized_hole, resized_points, views
from ccmdist.data.writer import write_set, write_shard
from ccmdist.errors import ShardError


def with_hole(triple):
    hole = np.zeros(triple.image.shape, bool)
    hole[10:20, 5:60] = True
    return replace(triple, inpaint_mask=hole)


def with_points(triple):
    points = np.zeros(triple.image.shape, np.uint8)
    points[[3, 30, 31, 63], [63, 7, 8, 0]] = (1, 2, 3, 1)
    return replace(triple, points=points)


def triples():
    """Four samples: with both members, with one of them, with none."""
    first, second, third, fourth = (sample(0, "Control", number, 0, 64) for number in range(4))
    return [with_hole(with_points(first)), with_points(second), with_hole(third), fourth]


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def assert_same(found, expected):
    assert (found.key, found.meta) == (expected.key, expected.meta)
    for name in ("image", "nerve_mask", "inpaint_mask", "points"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_optional_members_stand_before_the_fields_and_come_back_bit_for_bit():
    first, second, third, fourth = (members_of(triple) for triple in triples())
    assert list(first) == ["image.png", "mask.png", "inpaint_mask.png", "points.png", "json"]
    assert [list(found)[2:-1] for found in (second, third, fourth)] == [["points.png"], ["inpaint_mask.png"], []]
    for triple in triples():
        assert_same(triple_of(triple.key, members_of(triple), "here"), triple)


def test_what_a_sample_brings_changes_no_other_member():
    triple = triples()[0]
    bare = members_of(replace(triple, inpaint_mask=None, points=None))
    assert {name: data for name, data in members_of(triple).items() if name in bare} == bare


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"points": np.zeros((32, 48), np.uint8)},
            "image.png is 64x64 px and points.png 32x48 px, expected one size",
        ),
        (
            {"inpaint_mask": np.ones((64, 32), bool)},
            "image.png is 64x64 px and inpaint_mask.png 64x32 px, expected one size",
        ),
        (
            {"inpaint_mask": np.zeros((64, 64), bool)},
            "inpaint_mask.png covers nothing; leave it out where the whole image is known, or draw the hole",
        ),
        (
            {"points": np.full((64, 64), 4, np.uint8)},
            "points.png holds other values than the codes 0, 1, 2, 3; write one pixel for each point",
        ),
    ],
)
def test_a_hole_or_points_that_cannot_be_are_neither_written_nor_read(changes, message):
    triple = sample(0, "Control", 0, 0, 64)
    with pytest.raises(ShardError) as error:
        members_of(replace(triple, **changes))
    assert str(error.value).startswith(f"sample {triple.key}: {message}")
    wrong = {
        f"{name}.png": png(pixels.astype(np.uint8) * (255 if pixels.dtype == bool else 1))
        for name, pixels in changes.items()
    }
    with pytest.raises(ShardError) as error:
        triple_of(triple.key, members_of(triple) | wrong, "train-000000.tar")
    assert str(error.value).startswith(f"train-000000.tar: sample {triple.key}: {message}")


def test_a_hole_of_shades_is_refused():
    triple = sample(0, "Control", 0, 0, 64)
    wrong = members_of(triple) | {"inpaint_mask.png": png(np.full((64, 64), 7, np.uint8))}
    with pytest.raises(ShardError, match=r"inpaint_mask.png holds other values than 0 and 255; make it two-valued"):
        triple_of(triple.key, wrong, "here")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ((0, 1, 3, 2, 4), "inpaint_mask.png stands behind points.png"),
        ((0, 2, 1, 3, 4), "mask.png is missing before inpaint_mask.png"),
        ((0, 1, 2, 2, 3, 4), "inpaint_mask.png stands behind inpaint_mask.png"),
        ((0, 1, 4, 2), "image.png is missing before inpaint_mask.png"),
        ((0, 1, 2, 3), "json is missing"),
    ],
)
def test_members_out_of_order_are_told(tmp_path, order, message):
    members = list(members_of(triples()[0]).items())
    path = tmp_path / "train-000000.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in (members[index] for index in order):
            info = tarfile.TarInfo(f"k.{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    entry = write_shard(tmp_path / "right", path.name, "train", triples()[:1])
    data = path.read_bytes()
    commit_manifest(tmp_path, "phantom", [replace(entry, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())])
    with pytest.raises(ShardError, match=message):
        verify_set(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A set of the four samples, two in train and two in test."""
    out = tmp_path_factory.mktemp("optional") / "set"
    splits = ("train", "test", "train", "test")
    write_set(out, "phantom", zip(splits, triples(), strict=True), 4)
    return out


def test_a_set_with_optional_members_is_read_verified_and_audited(folder):
    found = [*read_split(folder, "train"), *read_split(folder, "test")]
    for triple, expected in zip(found, [triples()[index] for index in (0, 2, 1, 3)], strict=True):
        assert_same(triple, expected)
    assert verify_set(folder).manifest.num_samples == 4
    assert audit_set(folder, read_manifest(folder))


def test_text_in_an_optional_picture_is_found(tmp_path):
    triple = triples()[0]
    entry = write_shard(tmp_path, "train-000000.tar", "train", [triple])
    data = (tmp_path / entry.name).read_bytes()
    plain = members_of(triple)["points.png"]
    chunk = b"\0\0\0\4tEXtA\0Zo"
    chunk += zlib.crc32(chunk[4:]).to_bytes(4)
    dirty = plain[:33] + chunk + plain[33:]
    at = data.index(plain)
    info = tarfile.TarInfo(f"{triple.key}.points.png")
    info.size = len(dirty)
    grown = info.tobuf(tarfile.USTAR_FORMAT) + dirty + bytes(-len(dirty) % 512)
    changed = data[: at - 512] + grown + data[at + len(plain) + -len(plain) % 512 :]
    (tmp_path / entry.name).write_bytes(changed)
    sha256 = hashlib.sha256(changed).hexdigest()
    commit_manifest(tmp_path, "phantom", [replace(entry, num_bytes=len(changed), sha256=sha256)])
    with pytest.raises(ShardError, match=r"points.png: its picture has a chunk tEXt"):
        audit_set(tmp_path, read_manifest(tmp_path))


def test_webdataset_and_hugging_face_read_optional_members(tmp_path):
    disable_progress_bars()
    expected = [with_hole(with_points(sample(0, "T1DPN", number, 0, 64))) for number in range(3)]
    write_set(tmp_path / "set", "phantom", (("train", triple) for triple in expected), 4)
    files = [str(tmp_path / "set" / "train-000000.tar")]
    plain = list(webdataset.WebDataset(files, shardshuffle=False))
    streamed = list(load_dataset("webdataset", data_files={"train": files}, split="train", streaming=True))
    for triple, ours, theirs in zip(expected, plain, streamed, strict=True):
        assert ours["__key__"] == theirs["__key__"] == triple.key
        assert ours["points.png"] == members_of(triple)["points.png"]
        np.testing.assert_array_equal(np.asarray(theirs["points.png"]), triple.points)
        np.testing.assert_array_equal(np.asarray(theirs["inpaint_mask.png"]) == 255, triple.inpaint_mask)
        np.testing.assert_array_equal(np.asarray(theirs["image.png"]), triple.image)


def test_webdataset_reads_sets_in_which_only_some_samples_bring_them(folder):
    (both, hole) = webdataset.WebDataset([str(folder / "train-000000.tar")], shardshuffle=False)
    assert {"points.png", "inpaint_mask.png"} <= both.keys()
    assert "points.png" not in hole


@pytest.mark.parametrize("size_px", [48, 64, 96])
def test_views_turn_and_scale_hole_points_mask_and_image_alike(size_px):
    triple = triples()[0]
    plain, *turned = views(triple, size_px, tuple(FLIPS), "here")
    assert {plain.image.shape, plain.nerve_mask.shape, plain.inpaint_mask.shape, plain.points.shape} == {(size_px,) * 2}
    for view, flip in zip(turned, FLIPS.values(), strict=True):
        for name in ("image", "nerve_mask", "inpaint_mask", "points"):
            frame = getattr(view, name)
            np.testing.assert_array_equal(frame, flip(getattr(plain, name)))
            assert frame.flags.c_contiguous
    if size_px == 64:
        assert plain.points is triple.points
        assert plain.inpaint_mask is triple.inpaint_mask


edges = st.integers(2, 40)


@given(edges, edges, st.integers(0, 2**32))
def test_a_scaled_hole_has_every_pixel_that_it_has_a_part_in(edge_px, size_px, seed):
    hole = np.random.default_rng(seed).random((edge_px, edge_px)) > 0.9
    found = resized_hole(hole, size_px)
    assert found.any() == hole.any()
    if size_px <= edge_px:
        # Edges of pixels in units of 1 / (edge_px * size_px) of the frame: whole numbers, so overlaps are exact.
        big, small = np.arange(edge_px) * size_px, np.arange(size_px) * edge_px
        overlaps = (big < small[:, None] + edge_px) & (big + size_px > small[:, None])
        np.testing.assert_array_equal(found, (overlaps @ hole @ overlaps.T) > 0)


@given(edges, edges, st.integers(0, 2**32))
def test_scaled_points_stay_single_pixels_at_their_places(edge_px, size_px, seed):
    rng = np.random.default_rng(seed)
    points = np.zeros((edge_px, edge_px), np.uint8)
    for row, column in rng.integers(0, edge_px, (5, 2)):
        points[row, column] = rng.integers(1, 4)
    found = resized_points(points, size_px)
    expected = np.zeros((size_px, size_px), np.uint8)
    for row, column in zip(*np.nonzero(points), strict=True):
        place = tuple(int((at + 0.5) * size_px / edge_px) for at in (row, column))
        expected[place] = max(expected[place], points[row, column])
    np.testing.assert_array_equal(found, expected)


def test_samples_read_one_by_one_bring_them_too(folder, tmp_path):
    data = DataSettings(shards=folder, model=tmp_path / "none", image_size_px=32, flips=("vflip",))
    samples = ShardSamples(data)
    expected = {view.key: view for triple in triples() for view in views(triple, 32, ("vflip",), "")}
    for entry in samples.entries("train"):
        found = samples.triple(entry)
        assert_same(replace(found, meta=expected[entry.key].meta), expected[entry.key])


def test_folds_keep_them(tmp_path):
    source = [with_points(sample(0, "Control", number, 0, 64)) for number in range(4)]
    source[0] = with_hole(source[0])
    write_set(tmp_path / "set", "phantom", (("train", triple) for triple in source), 4)
    for fold in range(4):
        out = tmp_path / f"fold{fold}"
        manifest = write_fold_set(FoldShardsConfig(source=tmp_path / "set", out=out, fold=fold, num_folds=4))
        found = {triple.key: triple for shard in manifest.shards for triple in read_shard(out, shard)}
        is_tested = any(source[0].meta.subject in entry.subjects for entry in manifest.of_split("test"))
        expected = source if is_tested else source[1:]
        assert found.keys() == {triple.key for triple in expected}
        for triple in expected:
            assert_same(found[triple.key], triple)


def test_phantoms_without_points_are_the_set_that_they_were_and_points_add_one_member(tmp_path):
    small = {"subjects_per_group": 1, "frames_per_subject": 1, "size_px": 128, "val_fraction": 0, "test_fraction": 0}
    plain = write_phantom_set(PhantomShardsConfig(out=tmp_path / "plain", **small))
    assert "with_points" not in plain.about["settings"]
    pointed = write_phantom_set(PhantomShardsConfig(out=tmp_path / "pointed", with_points=True, **small))
    assert pointed.about["settings"] == plain.about["settings"] | {"with_points": True}
    for ours, theirs in zip(
        read_split(tmp_path / "pointed", "train"), read_split(tmp_path / "plain", "train"), strict=True
    ):
        assert ours.points is not None
        assert_same(replace(ours, points=None), theirs)
    assert any(triple.points.any() for triple in read_split(tmp_path / "pointed", "train"))
    with pytest.raises(ShardError, match=r"made with other settings.with_points \(absent, now True\)"):
        write_phantom_set(PhantomShardsConfig(out=tmp_path / "plain", with_points=True, **small))
    assert resolved(PhantomShardsConfig(out=tmp_path))["with_points"] is False
