"""One copy withholds a set, whatever it wears; independent sets pass; what cannot be judged does not pass."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from ccmdist.data.writer import write_set
from ccmdist.evaluation.memorisation import search
from ccmdist.evaluation.memorisation.gate import _concerns, verdict_of
from ccmdist.evaluation.sets import open_sets
from ccmdist.evaluation.work import do_share, open_units

sys.path.insert(0, str(Path(__file__).parents[4] / "benchmarks"))
from measure.planted import (
    DISGUISES,
    copies,
    drawn,
    judged,
    real_set,
    stranger,
    training_frames,
    write_synthetic,
)

SIZE_PX = 128
NUM_INDEPENDENT = 3
NUM_IMAGES = 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("gate")
    real_set(root / "real", 18, SIZE_PX, 0)
    return root


@pytest.fixture(scope="module")
def manifest(world):
    return read_manifest(world / "real")


def independent(seed, num=NUM_IMAGES):
    return [drawn(one, f"{one.key}-0000") for one in (stranger(seed, number, SIZE_PX) for number in range(num))]


def verdict(world, tmp_path, triples, manifest, *more):
    write_synthetic(tmp_path / "set", triples, manifest)
    return judged(world / "real", tmp_path / "set", world / "report", *more)


def test_every_copy_is_listed_with_what_it_copies_in_every_disguise(world, manifest, tmp_path):
    frames = training_frames(world / "real")[::6]
    made = {}
    for number, disguise in enumerate(DISGUISES):
        for source, copy in copies(frames[number % 4 :: 4], disguise, 100 + number, SIZE_PX).items():
            made[f"c{number:02d}-{copy.key}"] = (source, replace(copy, key=f"c{number:02d}-{copy.key}"))
    others = independent(7)
    found = verdict(world, tmp_path, [*(copy for _, copy in made.values()), *others], manifest)
    assert {row.key: row.nearest_key for row in found.figures.copies} == {key: of for key, (of, _) in made.items()}
    assert not found.passed
    assert f"{len(made)} images are copies of training frames, NCC 0." in found.reasons[0]


def test_one_copy_alone_withholds_the_set_and_without_it_the_set_passes(world, manifest, tmp_path):
    others = independent(8)
    (tmp_path / "a").mkdir()
    passed = verdict(world, tmp_path / "a", others, manifest)
    assert passed.passed, passed.reasons
    assert passed.reasons == ()
    source, copy = next(iter(copies(training_frames(world / "real")[5:6], "noisy (SD 20)", 9, SIZE_PX).items()))
    (tmp_path / "b").mkdir()
    withheld = verdict(world, tmp_path / "b", [copy, *others], manifest)
    assert not withheld.passed
    assert [(row.key, row.nearest_key) for row in withheld.figures.copies] == [(copy.key, source)]
    assert withheld.reasons[0].startswith("1 image is a copy of training frames, NCC ")
    assert copy.key in withheld.reasons[0]
    assert withheld.set_digest == read_manifest(tmp_path / "b" / "set").digest != passed.set_digest


def test_independent_sets_pass(world, manifest, tmp_path):
    for number in range(NUM_INDEPENDENT):
        (tmp_path / str(number)).mkdir()
        found = verdict(world, tmp_path / str(number), independent(20 + number), manifest)
        assert found.passed, found.reasons
        assert found.figures.synthetic.highest_ncc < found.figures.copy_limit
    near = replace(found.figures, share=replace(found.figures.share, num_near_images=3, p=0.02))
    (told,) = set(_concerns(near, 0)) - set(_concerns(found.figures, 0))
    assert told.startswith(f"3 of {NUM_IMAGES} images come nearer to a training frame than held-out frames do (NCC")


def test_many_images_that_lean_on_training_frames_withhold_a_set_though_none_is_a_copy(world, manifest, tmp_path):
    frames = training_frames(world / "real")[:NUM_IMAGES]
    strangers = [stranger(30, number, SIZE_PX) for number in range(NUM_IMAGES)]
    mixed = [
        drawn(one, f"{one.key}-0000", 0.5 * one.image + 0.3 * frame.image)
        for one, frame in zip(strangers, frames, strict=True)
    ]
    found = verdict(world, tmp_path, mixed, manifest)
    assert not found.passed
    assert any("come nearer to a training frame than held-out frames do" in reason for reason in found.reasons)
    assert found.figures.share.p < 0.001
    assert found.figures.c_t < 0


def test_images_of_training_masks_are_refused_and_if_allowed_judged_without_nerves(world, manifest, tmp_path):
    frames = training_frames(world / "real")[:NUM_IMAGES]
    textures = [stranger(40, number, SIZE_PX).image for number in range(NUM_IMAGES)]

    def painted(frame, texture):
        image = texture.copy()
        image[frame.nerve_mask] = frame.image[frame.nerve_mask]
        return drawn(frame, f"{frame.key}-0000", image * 1.0)

    of_masks = [painted(frame, texture) for frame, texture in zip(frames, textures, strict=True)]
    (tmp_path / "a").mkdir()
    refused = verdict(world, tmp_path / "a", of_masks, manifest)
    assert refused.num_training_masks == NUM_IMAGES
    assert refused.reasons[0].startswith(f"{NUM_IMAGES} of {NUM_IMAGES} images were drawn from nerve masks of training")
    (tmp_path / "b").mkdir()
    allowed = verdict(world, tmp_path / "b", of_masks, manifest, "memorisation.allow_training_masks=true")
    assert allowed.passed, allowed.reasons
    assert allowed.nerves_blanked
    assert "frames were compared without nerves" in allowed.concerns[0]
    (tmp_path / "c").mkdir()
    copied = [painted(frames[0], frames[0].image), *of_masks[1:]]
    caught = verdict(world, tmp_path / "c", copied, manifest, "memorisation.allow_training_masks=true")
    assert [row.key for row in caught.figures.copies] == [f"{frames[0].key}-0000"]
    assert not caught.passed


def test_a_training_mask_is_known_by_its_pixels_whoever_it_is_said_to_be_of(world, manifest, tmp_path):
    frame = training_frames(world / "real")[3]
    other = stranger(50, 0, SIZE_PX)
    disguised = replace(drawn(other, "x-0000"), nerve_mask=frame.nerve_mask[::-1].copy())
    found = verdict(world, tmp_path, [disguised, *independent(51)], manifest)
    assert found.num_training_masks == 1
    assert "1 of 25 images were drawn from nerve masks of training subjects" in found.reasons[0]


def test_what_cannot_be_judged_is_withheld_with_the_reason(world, manifest, tmp_path):
    triples = independent(60)

    def reasons(name, training=None, real=world / "real", *more):
        about = {} if training is None else {"training": training}
        write_set(tmp_path / name, "synthetic", (("test", triple) for triple in triples), 64, about)
        found = judged(real, tmp_path / name, world / "report", *more)
        assert not found.passed
        return found.reasons

    assert reasons("silent") == ("it cannot be judged: it does not say on which subjects its generator was trained",)
    stranger_set = {"set_digest": "f" * 64, "split": "train", "subjects": None}
    told = "it was drawn by a generator trained on another set (ffffffffffff), whose subjects it does not name"
    assert reasons("elsewhere", stranger_set)[0] == f"it cannot be judged: {told}"
    more = {"set_digest": manifest.digest, "split": "train", "subjects": ["somebody-else"]}
    assert "was trained on 1 subjects that are not in the train split" in reasons("more", more)[0]
    known = {"set_digest": manifest.digest, "split": "train", "subjects": None}
    few = reasons("few", known, world / "real", "minimum.memorisation_held_out_images=500")
    assert few[0].startswith("it cannot be judged: 32 real images of subjects outside of training, at least 500")
    held_out = [("test", triple) for triple in read_split(world / "real", "test")]
    write_set(tmp_path / "no-train", "phantom", held_out, 64)
    assert reasons("alone", "untuned", tmp_path / "no-train") == (
        "it cannot be judged: the real set has no train split to compare it with",
    )
    tiny = verdict(world, tmp_path, triples[:2], manifest)
    assert "no share of near images would be significant at 0.001" in tiny.reasons[-1]


def test_held_out_frames_that_are_copies_themselves_close_the_gate(world, manifest, tmp_path):
    every = [(split, triple) for split in ("train", "val", "test") for triple in read_split(world / "real", split)]
    leak = replace(stranger(70, 0, SIZE_PX), image=every[0][1].image)
    leaking = write_set(tmp_path / "real", "phantom", [*every, ("test", leak)], 64)
    write_synthetic(tmp_path / "set", independent(71), leaking)
    found = judged(tmp_path / "real", tmp_path / "set", tmp_path / "report")
    assert not found.passed
    assert "a held-out frame is as near to a training frame as a copy (NCC 1.00)" in found.reasons[0]


def test_images_that_repeat_each_other_are_a_concern(world, manifest, tmp_path):
    triples = independent(80)
    repeated = replace(triples[1], key="again-0000", image=triples[0].image, nerve_mask=triples[0].nerve_mask)
    found = verdict(world, tmp_path, [repeated, *triples], manifest)
    assert sum(rate.num_duplicates for rate in found.figures.duplicates) == 2
    assert any("2 of 25 images show what another image of the set shows" in concern for concern in found.concerns)
    assert found.passed


def test_workers_share_the_search_and_a_second_run_searches_nothing(world, manifest, tmp_path, monkeypatch):
    write_synthetic(tmp_path / "set", independent(90), manifest)
    overrides = [f"real={world / 'real'}", f"synthetic.one={tmp_path / 'set'}", f"out={tmp_path / 'report'}"]
    sets = open_sets(load(EvaluateConfig, [], [*overrides, "num_bootstrap=200"]))
    units = search.units(sets)
    assert len(open_units(units)) == len(units) == 5
    for worker in range(2):
        do_share(units, worker, 2)
    assert not open_units(search.units(sets))
    before = {path: path.read_bytes() for path in (tmp_path / "report").rglob("*.json")}
    monkeypatch.setattr(search, "looked", lambda *_: pytest.fail("searched again"))
    found = verdict_of(sets, sets.synthetic[0], num_repaired=0)
    assert found == verdict_of(sets, sets.synthetic[0], num_repaired=0)
    assert {path: path.read_bytes() for path in (tmp_path / "report").rglob("*.json")} == before
    damaged = next(iter(before))
    damaged.write_bytes(before[damaged][:50])
    assert len(open_units(search.units(sets))) == 1


def test_settings_without_a_gate_give_no_verdict(world, manifest, tmp_path):
    write_synthetic(tmp_path / "set", independent(91, 2), manifest)
    overrides = [f"real={world / 'real'}", f"synthetic.one={tmp_path / 'set'}", f"out={tmp_path}", "memorisation=null"]
    sets = open_sets(load(EvaluateConfig, [], overrides))
    assert verdict_of(sets, sets.synthetic[0], num_repaired=0) is None
    assert search.units(sets) == []
