"""The second pillar from shards to page: chance beside agreement, controls beside their sets, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.groups import next_group
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.triple import prompt_for
from ccmdist.data.writer import write_set
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.biomarkers.agreement import limits_of_agreement
from ccmdist.evaluation.comparison import compare
from ccmdist.evaluation.report.biomarker_tables import beside_their_controls
from ccmdist.evaluation.report.write import write_report
from tests.unit.evaluation.drawn_images import drawn

SIZE_PX = 96


def wrongly_prompted(triple, image, **more):
    group = next_group(triple.meta.clinical_group)
    meta = {"prompt": prompt_for(group, triple.meta.eye, {})}
    return "test", drawn(triple, image, meta=meta, prompts="next_group", prompted_group=group, **more)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Phantoms, a set like them, its control with less contrast, and a control of a set that is not there."""
    root = tmp_path_factory.mktemp("sets")
    write_phantom_set(
        PhantomShardsConfig(
            out=root / "real",
            subjects_per_group=4,
            frames_per_subject=1,
            test_fraction=1 - 1e-9,
            val_fraction=0,
            size_px=SIZE_PX,
        )
    )
    rng = np.random.default_rng(0)
    real = list(read_split(root / "real", "test"))
    noisy = [triple.image + rng.normal(0, 3, triple.image.shape) for triple in real]
    pairs = list(zip(real, noisy, strict=True))
    write_set(root / "like", "synthetic", (("test", drawn(t, image)) for t, image in pairs), 32)
    write_set(root / "control", "synthetic", (wrongly_prompted(t, 0.7 * image) for t, image in pairs), 32)
    write_set(root / "stray", "synthetic", (wrongly_prompted(t, image, seed=9) for t, image in pairs), 32)
    return root


def config_of(root, out, *names, **folders):
    given = [f"synthetic.{name}={root / name}" for name in names]
    given += [f"{name}={folder}" for name, folder in folders.items()]
    base = [f"real={root / 'real'}", f"out={out}", "num_bootstrap=100", "num_grid_images=2"]
    return load(EvaluateConfig, [], [*base, *given, "memorisation=null"])


@pytest.fixture(scope="module")
def comparison(sets, tmp_path_factory):
    return compare(config_of(sets, tmp_path_factory.mktemp("report"), "control", "like", "stray"))


@pytest.fixture(scope="module")
def page(comparison):
    return write_report(comparison).read_text()


def test_agreement_stands_above_chance_and_chance_is_of_other_subjects(comparison):
    for adherence in (comparison.segmenter_error, *(one.adherence for one in comparison.sets)):
        assert adherence.dice > adherence.chance.dice + 0.3
        assert adherence.cldice > adherence.chance.cldice + 0.3
        assert adherence.agreement["cnfl"] > adherence.chance.agreement["cnfl"]
        assert adherence.chance.num_images == adherence.chance.num_of_other_subjects == adherence.num_images


def test_limits_of_agreement_are_those_of_the_images(comparison):
    table = comparison.table
    expected = limits_of_agreement(table["found_cnfl"].to_numpy(), table["given_cnfl"].to_numpy(), len(table))
    assert comparison.segmenter_error.limits["cnfl"] == expected
    assert comparison.segmenter_error.limits["cnfl"].num_subjects == table["subject"].nunique()


def test_a_control_names_the_set_it_controls_and_what_the_prompt_does(comparison):
    control, like, stray = comparison.sets
    assert like.control is None
    assert (control.control.prompts, control.control.of) == ("next_group", "like")
    assert (stray.control.of, stray.control.prompt_effect) == (None, {})
    width = control.control.prompt_effect["cnfl"]
    assert width.num_pairs == len(like.table)
    assert width.bias == pytest.approx((like.table["found_cnfl"] - control.table["found_cnfl"]).mean())
    assert set(control.control.prompt_effect) == set(QUANTITIES)


def test_the_report_labels_controls_and_puts_them_beside_their_sets(page):
    rows = re.search(r'<table id="adherence-table">.*?</table>', page, re.S)[0]
    order = re.findall(r"</i>(\w+)( <span class=\"badge\">wrong prompt</span>)?</span>", rows)
    assert [(name, bool(badge)) for name, badge in order] == [("like", False), ("control", True), ("stray", True)]
    assert 'id="prompt-effect"' in page
    assert "inherit the biomarkers of their masks" in page
    sentences = " ".join(re.findall(r"<li>(.*?)</li>", page, re.S))
    assert "control is a control, drawn with the prompts of other clinical groups" in sentences
    assert "Against like, from the same masks and noise, the prompt alone changes" in sentences
    assert "stray is a control" in sentences
    assert "the set that it controls is not compared here" in sentences
    assert "Images drawn from a nerve mask inherit its nerves, and with them its CNFD, CNBD, CNFL and CTBD" in sentences
    assert "by chance" in sentences


def test_power_stands_beside_every_verdict(comparison, page):
    rows = [row for one in comparison.sets for row in one.equivalence]
    assert rows
    assert all(0 <= row.power <= 1 and row.subjects_needed >= 2 for row in rows)
    assert all(row.power >= 0.85 for row in rows if row.subjects_needed <= min(row.num_real_subjects, 4))
    head = re.search(r'<table id="equivalence".*?</thead>', page, re.S)[0]
    assert head.count("<th>power</th>") == len(comparison.sets)


def test_controls_follow_what_they_control_in_any_order():
    sets = {
        "a": {"control": {"of": "c"}},
        "b": {"control": None},
        "c": {"control": None},
        "d": {"control": {"of": None}},
        "e": {"control": {"of": "c"}},
    }
    assert list(beside_their_controls(sets)) == ["b", "c", "a", "e", "d"]


def foreign(triple):
    return replace(triple, key=f"f-{triple.key}", meta=replace(triple.meta, subject=f"f-{triple.meta.subject}"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (
            lambda triple: triple,
            r"the real frame of its mask 1\.0417 at this size; compare it with the set whose masks",
        ),
        (
            foreign,
            r"expected 1\.0417 as the real frames at this size have: their biomarkers are on another scale; compare",
        ),
    ],
    ids=["of a real mask", "of a foreign mask"],
)
def test_pixels_of_another_size_are_refused(source, told, sets, tmp_path):
    real = [source(triple) for triple in read_split(sets / "real", "test")]
    other = (("test", drawn(t, t.image, meta={"um_per_px": 0.5})) for t in real[:3])
    write_set(tmp_path / "other", "synthetic", other, 16)
    with pytest.raises(EvaluationError, match=r"synthetic\.other: sample .*-0000 has 0\.5000 um per px, " + told):
        compare(config_of(sets, tmp_path / "out", **{"synthetic.other": tmp_path / "other"}))


def test_a_set_without_any_nerve_in_its_masks_is_refused(sets, tmp_path):
    real = [replace(t, nerve_mask=np.zeros_like(t.nerve_mask)) for t in read_split(sets / "real", "test")]
    write_set(tmp_path / "bare", "synthetic", (("test", drawn(t, t.image)) for t in real[:3]), 16)
    with pytest.raises(
        EvaluationError,
        match=r"synthetic\.bare: the masks of all 3 samples are empty, expected nerves to compare with; pack the set",
    ):
        compare(config_of(sets, tmp_path / "a", **{"synthetic.bare": tmp_path / "bare"}))
    phantoms = (("test", replace(t, meta=t.meta)) for t in real)
    write_set(tmp_path / "real", "phantom", phantoms, 16)
    with pytest.raises(EvaluationError, match=r"real: the masks of all 11 samples are empty, expected nerves"):
        compare(config_of(sets, tmp_path / "b", "like", real=tmp_path / "real"))


def test_some_empty_masks_are_counted_and_told(sets, tmp_path):
    real = list(read_split(sets / "real", "test"))
    emptied = [replace(real[0], nerve_mask=np.zeros_like(real[0].nerve_mask)), *real[1:5]]
    write_set(tmp_path / "some", "synthetic", (("test", drawn(t, t.image)) for t in emptied), 16)
    found = compare(config_of(sets, tmp_path / "out", **{"synthetic.some": tmp_path / "some"}))
    assert found.sets[0].adherence.num_without_nerves == 1
    assert found.sets[0].adherence.limits["cnfw"].num_pairs <= 4
    assert "1 of 5 masks show no nerve" in write_report(found).read_text()


def test_one_subject_and_one_image_leave_out_what_they_cannot_tell(sets, tmp_path):
    triple = next(read_split(sets / "real", "test"))
    write_set(tmp_path / "one", "synthetic", [("test", drawn(triple, triple.image))], 16)
    comparison = compare(config_of(sets, tmp_path / "out", **{"synthetic.one": tmp_path / "one"}))
    found = comparison.sets[0]
    assert found.equivalence == []
    assert all(limits is None for limits in found.adherence.limits.values())
    assert all(np.isnan(value) for value in found.adherence.agreement.values())
    figures = found.adherence
    assert np.isnan([figures.dice, figures.cldice, figures.offset_px, figures.bias["cnfl"], figures.chance.dice]).all()
    told = {(one.what, one.reason) for one in found.left_out}
    reason = "1 of 1 images have a value of their nerves and one of their mask, at least 3 are needed"
    assert ("CNFL, ICC and limits of agreement", reason) in told
    assert ("Dice, clDice and offset", "1 images, at least 3 are needed") in told
    fewer = "11 real and 1 synthetic subjects have a value, at least 3 each are needed"
    assert ("CNFL, all subjects", fewer) in told
    page = write_report(comparison).read_text()
    rows = page[page.index('id="left-out"') :].partition("</table>")[0]
    assert rows.count(reason) == 1, "what is left out for one reason stands in one row"
    assert "one: too few images to say whether nerves lie where they were wanted." in page
    assert not re.search(r"\bnan\b", page)
