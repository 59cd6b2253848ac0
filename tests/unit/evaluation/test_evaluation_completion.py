"""Repaired frames from shards to report: figures inside the holes, what the rest is worth, and none is released."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from ccmdist.config.data import HoleSettings, PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.holes import HOLE_GREY, holes_of
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.views import flipped
from ccmdist.data.writer import write_set
from ccmdist.errors import RunError
from ccmdist.evaluation.comparison import compare
from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE, SHARE, column, in_hole
from ccmdist.evaluation.report.pictures import HOLE_COLOUR, outlined, overlay
from ccmdist.evaluation.report.write import report_values, write_report
from ccmdist.evaluation.sets import SourceFrames
from ccmdist.jobs import evaluate
from ccmdist.jobs.release import release
from tests.unit.evaluation.drawn_images import drawn
from tests.unit.evaluation.html_pages import Page, Widths

SIZE_PX = 64
HOLES = HoleSettings(shapes=("rectangle", "band", "everything"), per_sample=3)


def repaired(triple, image, number, **more):
    """The frame with one of its holes filled from ``image``."""
    hole = (
        holes_of(triple, HOLES, triple.image.shape[0])[number % 3]
        if triple.inpaint_mask is None
        else triple.inpaint_mask
    )
    found = drawn(triple, np.where(hole, image, triple.image), number, objective="completion", hole=number % 3, **more)
    return replace(found, inpaint_mask=hole)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Phantoms; repairs that are nearly right, beside whole images; repairs that are grey."""
    root = tmp_path_factory.mktemp("sets")
    settings = {"subjects_per_group": 5, "test_fraction": 0.4, "val_fraction": 0.4, "size_px": SIZE_PX}
    write_phantom_set(PhantomShardsConfig(out=root / "real", **settings))
    rng = np.random.default_rng(0)
    real = list(read_split(root / "real", "test"))
    about = {"training": "untuned"}

    def near(triple):
        return triple.image + rng.normal(0, 6, triple.image.shape)

    some = [repaired(t, near(t), number) for t in real for number in range(2)]
    some += [drawn(t, near(t), 7) for t in real[:5]]
    # Flipped views are compared with flipped frames.
    some += [
        replace(repaired(view, view.image, 0, source_key=f"{t.key}-hflip"), key=f"{t.key}-hflip-c0000")
        for t, view in ((t, flipped(t, "hflip")) for t in real[:3])
    ]
    write_set(root / "near", "synthetic", (("test", one) for one in some), 16, about)
    grey = (
        repaired(t, np.full_like(t.image, HOLE_GREY), number, structure="points") for t in real for number in (0, 1)
    )
    write_set(root / "grey", "synthetic", (("test", one) for one in grey), 16, about)
    return root


def config_of(root, out, *more):
    overrides = [f"real={root / 'real'}", f"out={out}", "num_bootstrap=200", "num_grid_images=2"]
    return load(EvaluateConfig, [], [*overrides, *more])


@pytest.fixture(scope="module")
def comparison(sets, tmp_path_factory):
    both = [f"synthetic.{name}={sets / name}" for name in ("near", "grey")]
    return compare(config_of(sets, tmp_path_factory.mktemp("report"), *both, "minimum.memorisation_held_out_images=10"))


@pytest.fixture(scope="module")
def page(comparison):
    return write_report(comparison)


def test_repaired_frames_are_compared_with_their_frames_inside_their_holes(sets, comparison):
    near, grey = comparison.sets
    frames = {triple.key: triple for triple in read_split(sets / "real", "test")}
    images = {triple.key: triple for triple in read_split(sets / "near", "test")}
    whole = near.table[near.table[SHARE].isna()]
    assert (len(whole), near.completion.num_whole_images) == (5, 5)
    assert near.completion.num_images == len(near.table) - 5
    for row in near.table.dropna(subset=[SHARE]).to_dict("records"):
        image, flip = images[row["key"]], row["source_key"].endswith("-hflip")
        frame = (
            flipped(frames[row["source_key"].removesuffix("-hflip")], "hflip") if flip else frames[row["source_key"]]
        )
        expected = in_hole(frame.image, image.inpaint_mask, {DRAWN: image.image})[DRAWN]
        assert {measure: row[column(DRAWN, measure)] for measure in IN_HOLE} == expected
        assert row[SHARE] == image.inpaint_mask.mean()
    drawn_ssim, grey_ssim = (one.completion.measure(DRAWN, "ssim") for one in (near, grey))
    assert drawn_ssim.mean > 0.6 > grey_ssim.mean + 0.2
    assert near.completion.measure("biharmonic", "filter_distance").gain_interval[0] > 0
    assert grey.completion.measure("biharmonic", "psnr_db").gain_interval[1] < 0


def test_a_frame_that_fills_the_hole_of_another_is_of_another_subject(sets, comparison):
    real, shape = comparison.real, comparison.shape
    frames = SourceFrames(real, shape)
    for triple in list(read_split(sets / "near", "test"))[:6]:
        assert frames.of_another(triple).meta.subject != triple.meta.subject
    stranger = replace(triple, meta=replace(triple.meta, provenance={"source_key": "nobody"}))
    assert frames.of_another(stranger) is None


def test_what_a_frames_own_hole_hides_is_not_compared(sets, tmp_path):
    hole = np.zeros((SIZE_PX, SIZE_PX), bool)
    hole[20:40, 30:60] = True
    real = list(read_split(sets / "real", "test"))[:6]
    damaged = [replace(triple, inpaint_mask=hole) for triple in real]
    write_set(tmp_path / "real", "phantom", (("test", one) for one in damaged), 16)
    images = (("test", repaired(one, one.image[::-1], 0)) for one in damaged)
    write_set(tmp_path / "mended", "synthetic", images, 16, {"training": "untuned"})
    (one,) = compare(config_of(tmp_path, tmp_path / "report", f"synthetic.x={tmp_path / 'mended'}")).sets
    assert one.completion.measures == []
    reasons = {omitted.what: omitted.reason for omitted in one.left_out}
    assert "of 6 of 6 repaired frames nobody knows what the hole hides" in reasons["inside the holes, the model"]


def test_the_gate_withholds_repaired_frames_whatever_it_finds_and_release_says_why(sets, comparison, page, tmp_path):
    for one in comparison.sets:
        assert not one.gate.passed
        assert one.gate.reasons[0] == (
            f"{one.completion.num_images} of {len(one.table)} images contain real pixels of subjects: they are frames "
            "of which a hole was filled, and outside of it they are the frame itself"
        )
        assert one.gate.figures is not None
        with pytest.raises(
            RunError, match=r"withheld by the gate and not released:\n  .*contain real pixels of subjects"
        ):
            release(sets / one.name, comparison.config.out, tmp_path / one.name)
        assert not (tmp_path / one.name).exists()


def test_the_report_shows_the_holes_and_says_what_other_figures_are_worth(comparison, page):
    text = page.read_text()
    parsed = Page(text)
    assert "Inside the holes" in text
    assert text.count('class="grid repaired"') == 2
    assert {source for source in parsed.sources if not source.startswith("data:image/")} == {"#completion"}
    values = json.loads((page.parent / "report.json").read_text())
    found = values["synthetic"]["near"]["completion"]
    assert found["filters"] == "log-on-off-v1"
    assert {row["fill"] for row in found["measures"]} == set(FILLS)
    told = [line for line in values["may_be_concluded"] if "inside the holes of" in line]
    assert told[0].startswith(f"near: inside the holes of {found['num_images']} repaired frames of ")
    assert "the model is better in SSIM, PSNR and filter distance than mean of the rim, biharmonic and" in told[0]
    assert told[1].startswith("grey: ")
    assert "worse in" in told[1]
    limits = [line for line in values["may_not_be_concluded"] if "Only “Inside the holes” is about the model" in line]
    assert len(limits) == 2
    assert "They take in 5 images that were drawn whole too: draw the two apart to tell." in limits[0]
    assert "LPIPS" in text
    assert not re.search(r"<t[dh][^>]*>\s*(<[^>]*>)*[^<]*LPIPS", text), "no figure may be called that"
    assert text.count("repaired frames</span>") >= 2
    assert set(Widths(text).of["in-hole"]) == {6}


def test_a_set_without_repaired_frames_has_no_such_figures(sets, tmp_path):
    real = list(read_split(sets / "real", "test"))
    write_set(tmp_path / "whole", "synthetic", (("test", drawn(t, t.image, 0)) for t in real), 16)
    comparison = compare(config_of(sets, tmp_path / "report", f"synthetic.x={tmp_path / 'whole'}", "memorisation=null"))
    assert comparison.sets[0].completion is None
    assert not [name for name in comparison.sets[0].table if name.startswith("hole_")]
    assert report_values(comparison)["synthetic"]["x"]["completion"] is None


def test_the_terminal_tells_what_fills_the_holes_beside_figures_of_whole_images(comparison, capsys):
    evaluate._print_holes(comparison)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(
        "images of near are repaired frames; the figures above are of whole images, with real pixels. Inside the holes:"
    )
    assert re.fullmatch(
        r"  the model \(\d+ images\): SSIM 0\.\d{3}, PSNR \d+\.\d dB, filter distance 0\.\d{3}", lines[1]
    )
    model, biharmonic = (re.search(r"\((\d+) images\)", line) for line in lines[1:3])
    assert int(model[1]) > int(biharmonic[1]), "those of whole frames have no rim"
    assert len(lines) == 6


def test_the_outline_of_a_hole_lies_around_it(sets):
    triple = next(
        t for t in read_split(sets / "near", "test") if t.inpaint_mask is not None and not t.inpaint_mask.all()
    )
    hole = triple.inpaint_mask
    picture = outlined(triple.image, hole)
    is_line = (picture == HOLE_COLOUR).all(axis=-1)
    assert is_line.any()
    assert not is_line[hole].any()
    assert np.array_equal(picture[~is_line], np.repeat(triple.image[..., None], 3, axis=2)[~is_line])
    assert (overlay(triple) == HOLE_COLOUR).all(axis=-1).any()
    assert np.array_equal(outlined(triple.image, None)[..., 0], triple.image)
