"""From shards to the first section of the report, with real network classes: units, their files, and no hidden n."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_split
from ccmdist.data.writer import write_set
from ccmdist.errors import EvaluationError, ShardError
from ccmdist.evaluation.comparison import compare
from ccmdist.evaluation.fidelity import extraction
from ccmdist.evaluation.fidelity.distances import METRICS
from ccmdist.evaluation.fidelity.paired import blurred
from ccmdist.evaluation.report.conclusions import may_be_concluded, may_not_be_concluded
from ccmdist.evaluation.report.fidelity_tables import distance_groups, paired_lines
from ccmdist.evaluation.report.write import report_values, write_report
from ccmdist.evaluation.sets import open_sets
from ccmdist.jobs import evaluate
from tests.unit.evaluation.drawn_images import drawn

SMALL = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
TEXT = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Phantoms in two shards; a set that is near them, and one that has lost its grain; two tiny networks."""
    root = tmp_path_factory.mktemp("world")
    phantoms = {"subjects_per_group": 4, "frames_per_subject": 4, "test_fraction": 0.5, "val_fraction": 0}
    write_phantom_set(PhantomShardsConfig(out=root / "real", size_px=64, samples_per_shard=12, **phantoms))
    rng = np.random.default_rng(0)

    real = list(read_split(root / "real", "test"))
    near = (("test", drawn(t, t.image + rng.normal(0, 3, t.image.shape))) for t in real)
    write_set(root / "near", "synthetic", near, 12)
    write_set(root / "smooth", "synthetic", (("test", drawn(t, blurred(t.image))) for t in real), 12)
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL)).save_pretrained(root / "dinov2")
    vision = {**SMALL, "intermediate_size": 16}
    CLIPModel(CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=6)).save_pretrained(root / "clip")
    return root


def config_of(world, out, *more):
    values = [f"real={world}/real", f"synthetic.near={world}/near", f"synthetic.smooth={world}/smooth", f"out={out}"]
    values += [f"extractors.dinov2={world}/dinov2", f"extractors.clip={world}/clip", "memorisation=null"]
    values += [f"minimum.{name}_images=12" for name in ("frechet", "kernel", "neighbour")]
    return load(EvaluateConfig, [], [*values, "num_bootstrap=100", "num_grid_images=1", *more])


@pytest.fixture(scope="module")
def comparison(world, tmp_path_factory):
    return compare(config_of(world, tmp_path_factory.mktemp("report")))


@pytest.fixture(scope="module")
def page(comparison):
    return write_report(comparison).read_text()


def test_every_shard_is_seen_once_by_every_extractor(world, comparison, monkeypatch):
    units = extraction.units(open_sets(comparison.config))
    # Features of 3 sets in 2 shards by 3 extractors, and perceptual distances by the two that see patches.
    assert len(units) == 3 * 2 * 3 + 3 * 2 * 2
    assert len({unit._path for unit in units}) == len(units)
    assert all(unit.is_done() for unit in units)
    monkeypatch.setattr(extraction.SeenFeatures, "read", lambda *_: pytest.fail("seen again"))
    monkeypatch.setattr(extraction.SeenDistances, "read", lambda *_: pytest.fail("seen again"))
    assert all(len(unit.result()) == unit.entry.num_samples for unit in units)


def test_features_of_a_set_come_in_its_order_with_the_subject_of_each_image(world, comparison):
    clip = extraction.extractions(open_sets(comparison.config))[2]
    found, triples = extraction.together(clip.real), list(read_split(world / "real", "test"))
    assert found.subjects.tolist() == [triple.meta.subject for triple in triples]
    alone = clip.extractor.features(triples[14].image[None])[0]
    np.testing.assert_allclose(found.values[14], alone, atol=1e-5)


def test_a_damaged_file_of_features_is_made_again_to_the_byte(comparison):
    damaged = sorted((comparison.config.out / extraction.FEATURES).glob("*dinov2*"))[0]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:40])
    (unit,) = (unit for unit in extraction.units(open_sets(comparison.config)) if unit._path == damaged)
    assert not unit.is_done()
    unit.run()
    assert damaged.read_bytes() == whole


def test_other_weights_make_other_files(world, comparison, tmp_path):
    for file in (world / "dinov2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, tmp_path / "model.safetensors")
    other = config_of(world, comparison.config.out, f"extractors.dinov2={tmp_path}")
    is_open = [not unit.is_done() for unit in extraction.units(open_sets(other))]
    assert sum(is_open) == 3 * 2 * 2


def test_weights_that_give_no_numbers_are_refused(world, tmp_path):
    (tmp_path / "broken").mkdir()
    for file in (world / "dinov2").iterdir():
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["layernorm.bias"][0] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors")
    config = config_of(world, tmp_path / "out", f"extractors.dinov2={tmp_path}/broken")
    with pytest.raises(EvaluationError, match=r"test-0000\d+.tar: dinov2-class-token-8 sees features that are no numb"):
        for unit in extraction.units(open_sets(config)):
            unit.run()


def test_missing_weights_are_told_before_anything_is_measured(world, tmp_path):
    config = config_of(world, tmp_path / "out", f"extractors.clip={tmp_path}/absent")
    with pytest.raises(EvaluationError, match=r"extractors.clip: .*absent holds no config.json .*; place there"):
        extraction.units(open_sets(config))
    with pytest.raises(EvaluationError, match=r"extractors.clip: .*absent holds no config.json .*; place there"):
        evaluate.describe(config)
    assert not (tmp_path / "out").exists()
    assert "extractor clip-image-embedding-6, 6 features" in evaluate.describe(config_of(world, tmp_path / "out"))


def test_a_shard_that_cannot_be_read_is_named(world, tmp_path):
    folder = tmp_path / "near"
    folder.mkdir()
    for file in (world / "near").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (shard, *_) = sorted(folder.glob("*.tar"))
    damaged = bytearray(shard.read_bytes())
    damaged[600] ^= 255
    shard.write_bytes(bytes(damaged))
    config = config_of(world, tmp_path / "out", f"synthetic.near={folder}")
    with pytest.raises(ShardError, match=shard.name):
        for unit in extraction.units(open_sets(config)):
            unit.run()


def test_all_metrics_are_told_and_cmmd_on_clip_alone(comparison):
    near = comparison.sets[0].fidelity
    by_extractor = {}
    for distance in near.distances:
        by_extractor.setdefault(distance.extractor, []).append(distance.metric)
    shared = ["frechet", "kernel", "precision", "recall", "density", "coverage"]
    assert by_extractor == {
        "power-spectrum-v1": ["spectrum"],
        "grain-autocorrelation-v1": ["grain_acf"],
        # Halves of 12 images extrapolate over at most 6 features.
        "weight-free-logbank-v1": shared,
        "dinov2-class-token-8": shared,
        "clip-image-embedding-6": [shared[0], "frechet_infinity", *shared[1:], "cmmd"],
    }
    assert {metric for metrics in by_extractor.values() for metric in metrics} == set(METRICS)
    told = {omitted.what: omitted.reason for omitted in comparison.sets[0].left_out}
    reason = told["Frechet distance, n → ∞ on weight-free-logbank-v1"]
    assert reason == "no half of the subjects has 24 real and 24 synthetic images beside it"


def test_denoised_images_beat_the_others_by_ssim_and_are_found_out_by_their_noise(comparison):
    near, smooth = (one.fidelity for one in comparison.sets)
    blur = near.measure("ssim").of_blur
    assert smooth.measure("ssim").mean == pytest.approx(blur)
    for metric in ("spectrum", "grain_acf"):
        assert near.distance(metric).of_halves < near.distance(metric).floor_range[1] * 2
        assert smooth.distance(metric).of_halves > 3 * smooth.distance(metric).floor_range[1]


def test_the_perceptual_distance_says_on_what_it_is_taken(comparison):
    perceptual = [one for one in comparison.sets[0].fidelity.paired if one.measure == "perceptual"]
    assert [one.extractor for one in perceptual] == ["dinov2-class-token-8", "clip-image-embedding-6"]
    assert all(len(one.extractor_sha256) == 64 and one.num_images == one.num_real == 24 for one in perceptual)
    assert all(0 < one.mean < 4 and 0 < one.of_blur < 4 for one in perceptual)


CONTEXT = ("num_real", "num_synthetic", "num_in_half", "num_features", "extractor", "extractor_sha256", "floor")


def test_no_distance_is_in_the_json_without_n_extractor_hash_and_floor(comparison):
    values = json.loads(json.dumps(report_values(comparison)))
    rows = [row for one in values["synthetic"].values() for row in one["fidelity"]["distances"]]
    assert len(rows) == 2 * 22
    assert all(row[name] is not None for row in rows for name in CONTEXT)
    assert {(row["num_real"], row["num_synthetic"]) for row in rows} == {(24, 24)}
    paired = [row for one in values["synthetic"].values() for row in one["fidelity"]["paired"]]
    assert all(row["num_images"] == row["num_real"] == 24 for row in paired)


def test_no_distance_is_on_the_page_without_n_extractor_hash_and_floor(page, comparison):
    table = page[page.index('<table id="distances"') :].split("</table>")[0]
    groups = re.split(r'<tr class="group">', table)[1:]
    assert len(groups) == 5
    for group in groups:
        heading, *lines = re.findall(r"<tr>.*?</tr>|^.*?</tr>", group, re.DOTALL)
        assert re.search(r"sha256 <code>[0-9a-f]{16}</code>, \d+ numbers per image", heading)
        for line in lines:
            cells = re.findall(r"<td[^>]*>(.*?)</td>", line, re.DOTALL)
            _, _, counts, _, in_half, between, floor = cells
            assert counts == "24 / 24"
            assert re.match(r"[\u22120-9]", between)
            assert re.match(r"[\u22120-9]", floor)
            # Half of six subjects, four frames each.
            assert in_half == "12"
    paired = page[page.index('<table id="paired"') :].split("</table>")[0]
    assert paired.count("n = 24") == 3 * 5


@pytest.mark.parametrize("missing", CONTEXT)
def test_the_table_is_refused_as_soon_as_one_distance_lacks_its_context(comparison, missing):
    sets = json.loads(json.dumps(report_values(comparison)["synthetic"]))
    assert distance_groups(sets)
    sets["smooth"]["fidelity"]["distances"][3][missing] = None
    with pytest.raises(
        EvaluationError, match="a distance without its extractor, that one's hash, the numbers of images"
    ):
        distance_groups(sets)
    del sets["smooth"]["fidelity"]["distances"][3][missing]
    with pytest.raises(EvaluationError, match=f"is not whole: .*{missing}"):
        distance_groups(sets)


def test_a_measure_that_one_set_lacks_is_left_open_in_its_column(comparison):
    sets = json.loads(json.dumps(report_values(comparison)["synthetic"]))
    sets["near"]["fidelity"]["paired"] = []
    lines = paired_lines(sets)
    assert [line["measure"] for line in lines] == ["ssim", "ms_ssim", "psnr_db", "perceptual", "perceptual"]
    assert all(line["rows"][0] is None and line["rows"][1] for line in lines)


def test_the_conclusions_say_where_noise_and_distances_lie_and_what_they_do_not_show(comparison):
    may = [sentence for sentence in may_be_concluded(comparison) if "floor" in sentence]
    assert len(may) == 2
    assert "smooth: further from the real images than these are among themselves" in may[1]
    assert "power spectrum" in may[1]
    may_not = " ".join(may_not_be_concluded(comparison))
    assert "rewards denoising" in may_not
    assert "none is an FID or KID" in may_not
