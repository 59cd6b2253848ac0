"""No generator has seen whom a fold tests: by construction, or refused by name; and no arm is silently smaller."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from small_sets import config_of, draw, phantoms, samples, trained_on

from ccmdist.config.arms import Arm
from ccmdist.config.data import FoldShardsConfig
from ccmdist.config.objectives.mdf_mllm import SegmentSettings
from ccmdist.data.fold_shards import write_fold_set
from ccmdist.data.manifest import read_manifest
from ccmdist.data.triple import prompt_for
from ccmdist.data.writer import write_set
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.downstream.choice import chosen
from ccmdist.evaluation.downstream.folds import folds_of
from ccmdist.evaluation.downstream.grid import planned
from ccmdist.evaluation.sets import open_sets
from ccmdist.models.network_folder import NetworkAbout, write_about


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Phantoms of 18 subjects; sets of a tuned generator, an untuned one, and one that does not say."""
    root = tmp_path_factory.mktemp("world")
    manifest = phantoms(root / "real", 6)
    draw(root / "real", root / "tuned", trained_on(manifest), num=2)
    draw(root / "real", root / "untuned")
    draw(root / "real", root / "silent", None)
    return root


def grid_of(world, names, *more, real="real"):
    config = config_of(world / real, {name: world / name for name in names}, world / "out", *more)
    return planned(open_sets(config), config.downstream)


def folds(world, names, *more):
    return grid_of(world, names, *more).folds


def test_subjects_of_any_generators_training_are_trained_on_in_all_folds_and_the_others_tested_once(world):
    training = set(trained_on(read_manifest(world / "real"))["subjects"])
    tested = []
    for fold in folds(world, ["tuned", "untuned"], "downstream.num_folds=3"):
        assert training <= fold.subjects("train")
        groups = Counter({one.subject: one.clinical_group for one in fold.samples("val")}.values())
        assert len(groups) == 3
        tested += fold.subjects("test")
    assert sorted([*tested, *training]) == sorted({t.meta.subject for t in samples(world / "real")})
    assert training


def test_with_an_untuned_generator_every_subject_is_tested_once(world):
    tested = [subject for fold in folds(world, ["untuned"]) for subject in fold.subjects("test")]
    assert sorted(tested) == sorted({t.meta.subject for t in samples(world / "real")})


def test_a_set_that_does_not_say_whom_its_generator_has_seen_is_refused(world):
    message = rf"synthetic.silent: {world}/silent does not say on which subjects its generator was trained, so it may"
    with pytest.raises(EvaluationError, match=message):
        folds(world, ["silent"])
    # What no arm trains on is not asked.
    assert folds(world, ["silent"], "downstream.arms=[real,augmented]")


def test_a_generator_drawing_elsewhere_is_known_by_the_digest_of_the_set_that_it_was_trained_on(world, tmp_path):
    manifest = read_manifest(world / "real")
    draw(world / "real", tmp_path / "known", trained_on(manifest, subjects=False))
    draw(world / "real", tmp_path / "strange", trained_on(manifest, subjects=False) | {"set_digest": "e" * 64})
    config = config_of(world / "real", {"known": tmp_path / "known"}, tmp_path / "out")
    seen = set(trained_on(manifest)["subjects"])
    assert all(seen <= fold.subjects("train") for fold in folds_of(open_sets(config), config.downstream))
    config = config_of(world / "real", {"strange": tmp_path / "strange"}, tmp_path / "out")
    with pytest.raises(
        EvaluationError, match=r"trained on another set \(e{12}\), whose .* trainings out: downstream=null"
    ):
        folds_of(open_sets(config), config.downstream)


@pytest.fixture(scope="module")
def given(world):
    """Two folds with a generator each, the second of which was trained on the first fold's subjects."""
    for number in range(2):
        folder = world / f"fold{number}"
        write_fold_set(FoldShardsConfig(source=world / "real", out=folder, fold=number, num_folds=2))
        manifest = read_manifest(folder)
        training = manifest.of_split("train")
        seen = {subject for shard in training for subject in shard.subjects}
        draw(folder, world / f"drawn{number}", trained_on(manifest), keep=lambda t, seen=seen: t.meta.subject in seen)
    return world


def fold_words(world, *drawn):
    told = ",".join(
        f"{{real: {world}/fold{number}, synthetic: {{x: {world}/{name}}}}}" for number, name in enumerate(drawn)
    )
    return f"downstream.folds=[{told}]"


def test_folds_that_are_given_keep_their_splits(given):
    grid = grid_of(given, ["untuned"], fold_words(given, "drawn0", "drawn1"), "downstream.arms=[real,'NAME:0.5']")
    assert [task.task for task in grid.tasks] == ["diagnosis", "segmentation"]
    assert [arm.text for arm in grid.tasks[0].arms] == ["real", "x:0.5"]
    for number, fold in enumerate(grid.folds):
        shards = read_manifest(given / f"fold{number}").of_split("test")
        assert fold.subjects("test") == {subject for shard in shards for subject in shard.subjects}


def test_a_generator_that_has_seen_whom_a_fold_tests_is_refused_by_set_fold_and_subject(given):
    tested = {subject for shard in read_manifest(given / "fold1").of_split("test") for subject in shard.subjects}
    seen = set(read_manifest(given / "drawn0").about["training"]["subjects"])
    subject = min(tested & seen)
    message = (
        f"downstream, fold 1: subject {subject} is tested, and the generator of x ({given}/drawn0) was trained on it; "
        "train a generator on the train split of each fold (`ccmdist shards fold`), and draw with that"
    )
    with pytest.raises(EvaluationError, match=re.escape(message)):
        grid_of(given, ["untuned"], fold_words(given, "drawn0", "drawn0"))


def unet_of(folder, set_digest, split="train"):
    """Words that let diagnosis begin with a U-Net that was trained on a split of a set."""
    facts = {"training_set_digest": set_digest, "training_split": split}
    write_about(folder, NetworkAbout(settings=SegmentSettings(), image_size_px=64, facts=facts, digest="0" * 64))
    mdf = f"{{kind: diagnose, mllm: llm, unet: {folder}, token_grid: 4}}"
    return f"downstream.networks={{diagnosis: mdf_mllm, size_px: 64, mdf: {mdf}}}"


def test_subjects_that_a_unet_was_pretrained_on_are_trained_on_in_all_folds(world, tmp_path):
    manifest = read_manifest(world / "real")
    words = unet_of(tmp_path, manifest.digest)
    for fold in folds(world, ["untuned"], "downstream.num_folds=3", words):
        assert manifest.subjects_of("train") <= fold.subjects("train")
    # Of segmentation it is no part.
    tested = [fold.subjects("test") for fold in folds(world, ["untuned"], words, "downstream.tasks=[segmentation]")]
    assert manifest.subjects_of("train") & frozenset().union(*tested)


def test_a_unet_that_may_have_seen_whom_a_fold_tests_is_refused(given, tmp_path):
    words = unet_of(tmp_path, read_manifest(given / "fold0").digest)
    message = rf"fold 1: subject \S+ is tested, and the U-Net of {tmp_path} was trained on it; leave networks.mdf.unet"
    with pytest.raises(EvaluationError, match=message):
        grid_of(given, ["untuned"], fold_words(given, "drawn0", "drawn1"), words)
    words = unet_of(tmp_path, "e" * 64)
    with pytest.raises(
        EvaluationError, match=r"networks.mdf.unet: \S+ was trained on another set, so it may have seen"
    ):
        folds(given, ["untuned"], words)


def test_folds_that_test_a_subject_twice_are_refused(given):
    words = fold_words(given, "drawn0", "drawn0").replace("fold1", "fold0")
    with pytest.raises(EvaluationError, match=r"subject \S+ is tested in fold 0 and in fold 1; make all folds with"):
        grid_of(given, ["untuned"], words)


def test_no_image_is_trained_on_whose_mask_is_of_a_subject_that_is_validated_or_tested(world):
    for fold in folds(world, ["tuned"]):
        held_out = fold.subjects("val") | fold.subjects("test")
        assert {one.subject for one in fold.synthetic["tuned"].samples} & held_out
        for arm in (Arm("tuned:1", "tuned", 1.0), Arm("only tuned", "tuned")):
            found = chosen(fold, arm, "diagnosis", 0)
            assert found.synthetic
            assert not {one.subject for one in (*found.synthetic, *found.real)} & held_out


def test_a_ratio_takes_as_many_of_each_group_and_a_larger_one_takes_more_beside_them(world):
    fold = folds(world, ["tuned"])[0]
    real = Counter(one.clinical_group for one in fold.samples("train"))
    taken = [chosen(fold, Arm("", "tuned", ratio), "diagnosis", 7).synthetic for ratio in (0.5, 1, 2)]
    for ratio, found in zip((0.5, 1, 2), taken, strict=True):
        assert Counter(one.clinical_group for one in found) == {group: ratio * num for group, num in real.items()}
    assert set(taken[0]) < set(taken[1]) < set(taken[2])
    assert set(chosen(fold, Arm("", "tuned", 0.5), "diagnosis", 8).synthetic) != set(taken[0])


def test_an_arm_with_too_few_images_is_left_out_with_the_reason(world):
    grid = grid_of(world, ["untuned"], "downstream.arms=[real,'NAME:1','NAME:2','phantom:5']")
    assert [arm.text for arm in grid.tasks[0].arms] == ["real", "untuned:1", "phantom:5"]
    assert {one.what: one.reason for one in grid.left_out}["diagnosis, arm untuned:2"] == (
        "in fold 0, untuned has 4 images of T1DPN whose masks are of no subject that is validated or tested, "
        "8 are needed"
    )
    assert len(grid.tasks[0].cells) == 2 * 2 * 3


@pytest.mark.parametrize(
    ("keep", "more", "reasons"),
    [
        (lambda t: t.meta.clinical_group == "Control", (), {"diagnosis": "all subjects are of Control"}),
        (
            lambda t: t.meta.subject == "control-0000",
            (),
            dict.fromkeys(("diagnosis", "segmentation"), "there is 1 subject, who cannot be trained on and tested"),
        ),
        (
            lambda t: t.meta.clinical_group != "T1DPN" or t.meta.subject < "t1dpn-0003",
            (),
            {"diagnosis": "fold 0 has no subject of T1DPN to train on"},
        ),
        (
            lambda t: True,
            ("minimum.downstream_test_subjects=10",),
            {
                "diagnosis": "fold 0 tests 3 subjects of Control, at least 10 are needed",
                "segmentation": "fold 0 tests 9 subjects, at least 10 are needed",
            },
        ),
    ],
)
def test_a_task_that_the_subjects_do_not_allow_is_left_out_with_the_reason(world, tmp_path, keep, more, reasons):
    write_set(tmp_path / "few", "phantom", (("test", t) for t in samples(world / "real") if keep(t)), 32)
    config = config_of(tmp_path / "few", {"untuned": world / "untuned"}, tmp_path / "out", *more)
    grid = planned(open_sets(config), config.downstream.model_copy(update={"arms": ("real",)}))
    assert {one.what: one.reason for one in grid.left_out} == reasons


def test_without_masks_nothing_is_segmented_and_the_unlabelled_are_not_diagnosed(world, tmp_path):
    def stripped():
        for triple in samples(world / "real"):
            meta = triple.meta
            if meta.subject == "control-0000":
                meta = replace(meta, clinical_group=None, prompt=prompt_for(None, meta.eye, {}))
            yield "test", replace(triple, nerve_mask=triple.nerve_mask & False, meta=meta)

    write_set(tmp_path / "bare", "phantom", stripped(), 32)
    config = config_of(tmp_path / "bare", {"untuned": world / "untuned"}, tmp_path / "out", "downstream.arms=[real]")
    grid = planned(open_sets(config), config.downstream)
    assert {one.what: one.reason for one in grid.left_out} == {
        "diagnosis of unlabelled subjects": "1 subjects without a clinical group take no part (first: control-0000)",
        "segmentation": "no real frame has a nerve in its mask",
    }
