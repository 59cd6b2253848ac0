"""A small made-up evaluation from shards to report: what is told, and that the page stands alone."""

import json
import re
import time
from dataclasses import replace
from datetime import datetime

import pytest

from ccmdist.ccm.segmenter import SEGMENTER_VERSION, segment
from ccmdist.commit import commit_json
from ccmdist.config.loading import resolved
from ccmdist.data.phantom_shards import sample as phantom_triple
from ccmdist.data.reader import read_split
from ccmdist.data.writer import write_set
from ccmdist.errors import EvaluationError
from ccmdist.evaluation import measures
from ccmdist.evaluation.comparison import compare
from ccmdist.evaluation.report.conclusions import may_be_concluded
from ccmdist.evaluation.report.write import report_values, write_report
from ccmdist.evaluation.sets import PROVENANCE
from ccmdist.jobs import evaluate
from tests.unit.evaluation.html_pages import Page, Widths
from tests.unit.evaluation.resembling_sets import config_of, drawn, provenance


@pytest.fixture(scope="module")
def comparison(sets, tmp_path_factory):
    return compare(config_of(sets, tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def page(comparison):
    return write_report(comparison)


def test_the_page_stands_alone(page):
    text = page.read_text()
    parsed = Page(text)
    assert parsed.sources
    assert all(source.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for source in parsed.sources)
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert "script" not in parsed.tags
    assert "Inside the holes" not in text, "no set repairs frames"
    assert "repaired frame" not in text.lower()
    assert "link" not in parsed.tags


def test_the_page_has_every_section_and_tells_the_segmenters_error_before_any_other_figure(page):
    text = page.read_text()
    sections = [
        "conclusions",
        "segmenter-error",
        "images",
        "adherence",
        "biomarkers",
        "equivalence",
        "p-values-1",
        "p-values-2",
    ]
    sections += ["fidelity", "left-out", "provenance"]
    assert [name for name in Page(text).ids if name in sections] == sections
    assert "ACCMetrics-style" in text
    assert SEGMENTER_VERSION in text


def test_the_page_shows_rows_of_mask_real_and_every_set(page):
    text = page.read_text()
    pictures = re.findall(r'alt="(\w+) of ([\w-]+)"', text)
    keys = {key for _, key in pictures}
    assert len(keys) == 4
    assert len({key.split("-")[0] for key in keys}) == 3
    assert all({name for name, of in pictures if of == key} == {"mask", "real", "close", "far"} for key in keys)


@pytest.mark.parametrize("num_more", [0, 3])
def test_rows_have_the_columns_of_their_head_and_many_sets_take_one_column_each(comparison, tmp_path, num_more):
    close = comparison.sets[0]
    more = [replace(close, images=replace(close.images, name=f"more_{number}")) for number in range(num_more)]
    named = comparison.config.synthetic | {one.name: one.images.folder for one in more}
    config = comparison.config.model_copy(update={"out": tmp_path, "synthetic": named})
    many = replace(comparison, config=config, sets=[*comparison.sets, *more])
    widths = Widths(write_report(many).read_text()).of
    num_sets = len(many.sets)
    equivalence = widths.pop("equivalence")
    assert set(equivalence) == ({2 + num_sets} if more else {2 + 3 * num_sets, 3 * num_sets})
    assert set(widths["paired"]) == {2 + num_sets}
    assert set(widths["appearance"]) == {2 + num_sets if more else 2 + 2 * num_sets}
    assert all(len(set(rows)) == 1 for rows in widths.values()), widths


def test_phantoms_are_called_phantoms(page, comparison):
    assert "Phantoms, not patients." in page.read_text()
    values = report_values(comparison)
    assert values["real"]["kind"] == "phantom"
    assert values["may_not_be_concluded"][0].startswith("The reference set consists of phantoms")
    assert any("inherit its nerves" in sentence for sentence in values["may_not_be_concluded"])


def test_every_number_is_in_the_json_and_comes_back_from_it(page, comparison):
    values = json.loads(
        (page.parent / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON")
    )
    assert datetime.fromisoformat(values.pop("made_at"))
    assert values == report_values(comparison)
    assert list(values["synthetic"]) == ["close", "far"]
    far = values["synthetic"]["far"]
    assert far["origins"][0]["adapter_digest"] == "untuned"
    assert {len(distance["extractor_sha256"]) for distance in far["fidelity"]["distances"]} == {64}
    assert far["counts"]["images_by_group"] == values["real"]["images_by_group"]


def test_the_near_set_is_nearer_in_every_respect(comparison):
    close, far = comparison.sets
    assert close.adherence.dice > far.adherence.dice + 0.2
    assert close.adherence.cldice > far.adherence.cldice + 0.2
    assert close.adherence.offset_px < 1.5
    assert far.adherence.offset_px == pytest.approx(4, abs=1)
    assert close.fidelity.measure("ssim").mean > far.fidelity.measure("ssim").mean + 0.2
    distances = [one.fidelity.distance("frechet") for one in (close, far)]
    assert distances[0].of_halves < distances[1].of_halves
    assert distances[0].floor == distances[1].floor
    assert abs(comparison.segmenter_error.dice - close.adherence.dice) < 0.1


def without_time(page):
    """The page without the one line that says when it was made."""
    made = re.compile(r"<dt>made</dt><dd>[0-9T:+-]{25}, ")
    text = page.read_text()
    assert len(made.findall(text)) == 1
    return made.sub("", text)


def test_the_second_run_measures_nothing_and_says_the_same(comparison, page, monkeypatch):
    before = without_time(page)
    monkeypatch.setattr(measures, "measured", lambda triple: pytest.fail("measured again"))
    again = compare(comparison.config)
    assert report_values(again) == report_values(comparison)
    assert without_time(write_report(again)) == before


def test_a_damaged_file_of_measures_is_measured_again(comparison):
    folder = comparison.config.out / "measures"
    damaged = sorted(folder.glob("*.safetensors"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[: len(whole) // 2])
    assert report_values(compare(comparison.config)) == report_values(comparison)
    assert damaged.read_bytes() == whole


def test_below_the_minimum_figures_are_left_out_with_the_reason(comparison):
    fewest = ("frechet_images", "kernel_images", "neighbour_images", "noise_images")
    minimum = dict.fromkeys(fewest, 500) | {"equivalence_subjects": 40, "paired_images": 400}
    config = comparison.config.model_copy(update={"minimum": type(comparison.config.minimum)(**minimum)})
    one = compare(config).sets[0]
    assert (one.fidelity.paired, one.fidelity.distances, one.equivalence) == ([], [], [])
    reasons = {omitted.what: omitted.reason for omitted in one.left_out}
    num = len(comparison.table)
    assert (
        reasons["Frechet distance on weight-free-logbank-v1"]
        == f"{num} real and {num} synthetic images, at least 500 each are needed"
    )
    assert f"{num} of {num} images were drawn from a mask of the real split" in reasons["SSIM, MS-SSIM and PSNR"]
    assert "at least 40 each are needed" in reasons["CNFL, all subjects"]
    values = report_values(compare(config))
    assert values["synthetic"]["close"]["fidelity"]["distances"] == []
    assert "no biomarker could be tested" in values["may_be_concluded"][0]
    Page(write_report(compare(config)).read_text())


def test_of_a_set_drawn_from_prompts_alone_the_report_says_so(comparison):
    close, far = comparison.sets
    assert not any("prompts alone" in sentence for sentence in may_be_concluded(comparison))
    maskless = close.images.manifest.model_copy(update={"about": {"sees_mask": False}})
    sets = [replace(close, images=replace(close.images, manifest=maskless)), far]
    told = [one for one in may_be_concluded(replace(comparison, sets=sets)) if "prompts alone" in one]
    found = close.adherence
    assert told == [
        "close was drawn from prompts alone. That the nerves of its images lie elsewhere than in the masks beside them "
        f"is no fault (Dice {found.dice:.2f}, {found.chance.dice:.2f} by chance), and what sets an image beside a mask "
        "or a frame says nothing of it."
    ]


def test_the_command_prints_a_table_and_the_path(sets, comparison, tmp_path, capsys):
    config = comparison.config
    commit_json(tmp_path / "config.json", resolved(config))
    shown = evaluate.describe(config)
    assert shown.splitlines()[1].startswith(f"close: {sets / 'close'}, split test, ")
    evaluate.run(str(tmp_path / "config.json"))
    printed = capsys.readouterr().out
    assert "clDice" in printed
    assert "Frechet distance on weight-free-logbank-v1" in printed
    assert printed.splitlines()[-1] == f"report: {config.out / 'report.html'}"


def test_images_that_do_not_say_where_they_come_from_are_refused(sets, comparison, tmp_path):
    triple = next(read_split(sets / "real", "test"))
    about = {name: value for name, value in provenance(triple, "d" * 64).items() if name != "adapter_digest"}
    write_set(tmp_path / "silent", "synthetic", [drawn(triple, triple.image, about)], 16)
    with pytest.raises(
        EvaluationError, match=r"test-000000.tar: sample .*-000: its provenance does not say adapter_digest; draw"
    ):
        compare(config_of(sets, comparison.config.out, f"synthetic.far={tmp_path / 'silent'}"))
    assert "adapter_digest" in PROVENANCE


def test_masks_of_other_subjects_give_no_pairs_and_no_promise_of_agreement(sets, comparison, tmp_path):
    triple = next(read_split(sets / "real", "test"))
    foreign = replace(triple, key="foreign-00", meta=replace(triple.meta, subject="foreign"))
    write_set(tmp_path / "foreign", "synthetic", [drawn(foreign, triple.image, provenance(foreign, "d" * 64))], 16)
    config = config_of(sets, comparison.config.out, f"synthetic.far={tmp_path / 'foreign'}")
    one = compare(config).sets[1]
    assert one.fidelity.paired == []
    assert not one.shares_subjects


def test_a_generator_that_has_seen_the_reference_is_said_to_have(sets, comparison, tmp_path):
    real = list(read_split(sets / "real", "test"))
    seen = sorted({triple.meta.subject for triple in real})[:2]
    about = {"training": {"set_digest": "d" * 64, "split": "train", "subjects": seen}}
    images = (drawn(triple, triple.image, provenance(triple, "d" * 64)) for triple in real)
    write_set(tmp_path / "seen", "synthetic", images, 16, about)
    found = compare(config_of(sets, comparison.config.out, f"synthetic.close={tmp_path / 'seen'}"))
    values, num = report_values(found), comparison.counts["num_subjects"]
    assert [one["num_reference_seen"] for one in values["synthetic"].values()] == [2, None]
    told = values["may_not_be_concluded"]
    assert any(line.startswith(f"The generator of close was trained on 2 of the {num} subjects") for line in told)
    assert any(line.startswith("far does not say on which subjects its generator was trained") for line in told)


def test_an_image_is_measured_in_a_fraction_of_a_second():
    triples = [phantom_triple(0, "Control", 0, frame, 128) for frame in range(5)]
    measures.measured(triples[4], segment(triples[4].image))
    start = time.process_time()
    for triple in triples[:4]:
        measures.measured(triple, segment(triple.image))
    # So 100 frames, synthetic and real, with the segmentation of each, take less than 20 s.
    assert (time.process_time() - start) / 4 < 0.2


def test_the_shipped_files_come_with_the_package():
    from importlib.resources import files

    assert files("ccmdist.evaluation.report").joinpath("page.html.j2").is_file()
