"""A small grid from shards to report: done once, by any number of workers, and summed up from what lies there."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from small_sets import config_of, draw, phantoms, trained_on

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.evaluation.comparison import compare
from ccmdist.evaluation.downstream import grid
from ccmdist.evaluation.downstream.cells import PROBABILITIES
from ccmdist.evaluation.downstream.examples import real_examples, training_examples
from ccmdist.evaluation.downstream.grid import describe, planned
from ccmdist.evaluation.downstream.pooled import pooled
from ccmdist.evaluation.downstream.summary import summary_of
from ccmdist.evaluation.report.write import write_report
from ccmdist.evaluation.sets import open_sets
from ccmdist.evaluation.work import do_share, open_units
from ccmdist.jobs import evaluate

ARMS = "downstream.arms=[real,augmented,'phantom:0.5','NAME:0.5','NAME:1',only NAME,'shuffled NAME:1']"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Phantoms of 18 subjects, and a set drawn by a generator that was trained on a few of them."""
    root = tmp_path_factory.mktemp("world")
    manifest = phantoms(root / "real", 6, val_fraction=0.5, test_fraction=0.2)
    draw(root / "real", root / "x", trained_on(manifest), num=2)
    return root


def config(world, out, *more):
    return config_of(world / "real", {"x": world / "x"}, world / out, *more)


@pytest.fixture(scope="module")
def summary(world):
    return summary_of(open_sets(config(world, "all", ARMS)))


def cells(config):
    return [cell for task in planned(open_sets(config), config.downstream).tasks for cell in task.cells]


def test_without_the_section_there_is_no_grid(world):
    sets = open_sets(config(world, "none", "downstream=null"))
    assert grid.units(sets) == []
    assert summary_of(sets) is None


def test_the_grid_is_told_before_it_is_trained(world):
    given = config(world, "told", "downstream.arms=[real,'x:0.5','x:9']")
    lines = describe(open_sets(given), given.downstream)
    assert lines[0] == "downstream, diagnosis: 8 trainings of 4 steps, 2 folds x 2 seeds x 2 arms (real, x:0.5)"
    assert lines[2].startswith("downstream, left out: diagnosis, arm x:9: in fold 0, x has ")


def test_nobody_learns_to_segment_from_images_that_were_drawn_from_prompts_alone(world, tmp_path):
    shutil.copytree(world / "x", tmp_path / "x")
    drawn = read_manifest(tmp_path / "x")
    commit_manifest(tmp_path / "x", "synthetic", drawn.shards, drawn.about | {"sees_mask": False})
    arms = "downstream.arms=[real,'x:0.5',only x]"
    given = config_of(world / "real", {"x": tmp_path / "x"}, tmp_path / "out", arms)
    grid_of = planned(open_sets(given), given.downstream)
    arms_of = {task.task: [arm.text for arm in task.arms] for task in grid_of.tasks}
    assert arms_of == {"diagnosis": ["real", "x:0.5", "only x"], "segmentation": ["real"]}
    reason = "x was drawn from prompts alone, so its masks do not show the nerves of its images"
    assert {(one.what, one.reason) for one in grid_of.left_out} == {
        (f"segmentation, arm {arm}", reason) for arm in ("x:0.5", "only x")
    }


def test_every_arm_has_equal_steps_and_the_images_that_its_name_says(summary):
    for task in summary.tasks:
        assert [arm.arm for arm in task.arms] == [
            *("real", "augmented", "phantom:0.5", "x:0.5", "x:1", "only x", "shuffled x:1")
        ]
        by_arm = {arm.arm: arm for arm in task.arms}
        assert all(arm.curve.steps == [2, 4] for arm in task.arms)
        real = by_arm["real"].num_real
        assert by_arm["x:1"].num_synthetic == by_arm["shuffled x:1"].num_synthetic == real
        assert by_arm["x:0.5"].num_synthetic == by_arm["phantom:0.5"].num_synthetic == tuple(n // 2 for n in real)
        assert (by_arm["only x"].num_real, by_arm["augmented"].num_synthetic) == ((0, 0), (0, 0))


def test_the_summary_says_on_whom_it_rests(summary):
    diagnosis, segmentation = summary.tasks
    assert (diagnosis.num_folds, diagnosis.num_seeds, diagnosis.num_steps) == (2, 2, 4)
    assert diagnosis.num_subjects == sum(fold["test"] for fold in summary.folds) == segmentation.num_subjects
    assert diagnosis.num_images == 2 * diagnosis.num_subjects
    assert diagnosis.subjects_by_group.keys() == set(CLINICAL_GROUPS)
    assert (diagnosis.primary, segmentation.primary) == ("macro_auc", "dice")
    assert summary.level == 0.95
    for task in summary.tasks:
        for arm in task.arms:
            for score in (*arm.scores.values(), *arm.subject_scores.values()):
                assert score.interval[0] <= score.value <= score.interval[1] or score.seed_sd > 0
            assert (arm.difference is None) == (arm.arm == "real")
            if arm.difference:
                real = task.arms[0].scores[task.primary]
                assert arm.difference.value == pytest.approx(arm.scores[task.primary].value - real.value)
                assert arm.difference.p <= arm.difference.p_holm <= 1
    tests = [test for arm in diagnosis.arms for test in arm.delong]
    assert len(tests) == 6 * 3
    assert all(test.p_holm >= test.p for test in tests if np.isfinite(test.p))


def test_a_score_is_the_mean_over_seeds_of_the_pooled_tests(world, summary):
    found = [cell for cell in cells(config(world, "all", ARMS)) if cell.task == "segmentation"]
    tables = [cell.read().table for cell in found if cell.arm.text == "x:1"]
    by_hand = np.mean([pd.concat(tables[:2])["dice"].mean(), pd.concat(tables[2:])["dice"].mean()])
    arm = next(arm for arm in summary.tasks[1].arms if arm.arm == "x:1")
    assert arm.scores["dice"].value == pytest.approx(by_hand)


def test_subjects_count_with_the_mean_of_their_frames(world, summary):
    some = [c for c in cells(config(world, "all", ARMS)) if c.task == "diagnosis" and c.arm.text == "real"]
    pool = pooled(
        "diagnosis", [cell.read() for cell in some], [c.seed_number for c in some], [c.fold.number for c in some]
    )
    table = pd.concat([cell.read().table for cell in some if cell.seed_number == 0])
    by_hand = table.groupby("subject")[list(PROBABILITIES)].mean()
    assert list(by_hand.index) == list(pool.subjects)
    assert pool.of_subjects[0] == pytest.approx(by_hand.to_numpy())
    assert [CLINICAL_GROUPS[label] for label in pool.subject_labels] == list(
        table.groupby("subject")["clinical_group"].first()
    )


def test_labels_and_masks_are_dealt_out_anew_among_synthetic_images_alone(world):
    given = config(world, "all", ARMS)
    cell = next(cell for cell in cells(given) if cell.arm.text == "shuffled x:1")
    images = cell._chosen(1)
    plain, dealt = (training_examples(images, cell.fold.real, 32, 0, shuffle) for shuffle in (None, 1))
    num = len(images.real)
    assert np.array_equal(plain.images, dealt.images)
    assert np.array_equal(plain.labels[:num], dealt.labels[:num])
    assert np.array_equal(plain.masks[:num], dealt.masks[:num])
    assert not np.array_equal(plain.labels[num:], dealt.labels[num:])
    assert sorted(plain.labels[num:]) == sorted(dealt.labels[num:])
    assert sorted(mask.tobytes() for mask in plain.masks) == sorted(mask.tobytes() for mask in dealt.masks)


def test_fresh_phantoms_are_none_of_the_reference_set(world):
    given = config(world, "all", ARMS)
    cell = next(cell for cell in cells(given) if cell.arm.text == "phantom:0.5")
    made = training_examples(replace(cell._chosen(0), real=cell._chosen(0).real[:1]), cell.fold.real, 64, 0)
    reference = {i.tobytes() for i in real_examples(cell.fold.real, cell.fold.real.samples, 64).images}
    assert made.images[0].tobytes() in reference
    assert not {image.tobytes() for image in made.images[1:]} & reference


def test_a_cell_is_done_once_and_again_when_its_file_is_damaged_or_anything_that_decides_it_changes(world):
    few = ("downstream.arms=[real]", "downstream.num_seeds=1", "downstream.tasks=[segmentation]")
    given = config(world, "once", *few)
    units = grid.units(open_sets(given))
    for unit in units:
        unit.run()
    before = {cell.path: cell.path.read_bytes() for cell in units}
    assert open_units(grid.units(open_sets(given))) == []
    units[0].path.write_text(units[0].path.read_text()[:-40])
    assert open_units(grid.units(open_sets(given))) == [units[0]]
    units[0].run()
    assert {path: path.read_bytes() for path in before} == before
    for more in ("downstream.networks.num_steps=5", "seed=1", "downstream.networks.lrs=[0.01]"):
        assert len(open_units(grid.units(open_sets(config(world, "once", *few, more))))) == len(units)
    same = ("num_bootstrap=200", "downstream.networks.diagnosis=resnet18", "downstream.arms=[real,augmented]")
    assert len(open_units(grid.units(open_sets(config(world, "once", *few, *same))))) == len(units)


def test_workers_that_share_the_grid_leave_the_files_of_a_single_one_and_give_its_figures(world):
    words = ("downstream.arms=[real,'x:0.5']",)
    single, shared = config(world, "single", *words), config(world, "shared", *words)
    expected = summary_of(open_sets(single))
    for worker in (2, 0, 1):
        do_share(grid.units(open_sets(shared)), worker, 3)
    files = {path.name: path.read_bytes() for path in (shared.out / "downstream").iterdir()}
    assert len(files) == 16
    assert files == {path.name: path.read_bytes() for path in (single.out / "downstream").iterdir()}
    assert summary_of(open_sets(shared)) == expected


def test_the_report_tells_what_the_grid_found(world, tmp_path):
    tested = {subject for shard in read_manifest(world / "real").of_split("test") for subject in shard.subjects}
    draw(world / "real", tmp_path / "x", keep=lambda triple: triple.meta.subject in tested)
    words = ("downstream.arms=[real,'phantom:0.5',only x]", "num_grid_images=1", "memorisation=null")
    given = config_of(world / "real", {"x": tmp_path / "x"}, tmp_path / "out", *words, "downstream.tasks=[diagnosis]")
    page = write_report(compare(given)).read_text()
    report = json.loads((given.out / "report.json").read_text())
    assert [task["task"] for task in report["downstream"]["tasks"]] == ["diagnosis"]
    assert len(report["downstream"]["tasks"][0]["arms"]) == 3
    assert "one image more or less is" in page
    assert "Phantoms of different groups differ by construction" in page
    assert 'id="downstream-diagnosis"' in page
    assert "Where the network looked" in page
    assert page.count('alt="saliency of ') == 3 * len(CLINICAL_GROUPS)
    assert "looks" not in report["downstream"]["tasks"][0]
    assert any(sentence.startswith("Diagnosis, macro-AUC against") for sentence in report["may_be_concluded"])


def test_before_the_sets_are_there_the_whole_grid_is_counted(world, tmp_path):
    words = ("downstream.arms=[real,'NAME:1']",)
    num_shards = len(read_manifest(world / "real").of_split("test"))
    given = config_of(world / "real", {"x": tmp_path / "x"}, tmp_path / "out", *words)
    assert evaluate.open_units(given) == 2 * num_shards + 2 * 2 * 2 * 2
    apart = config_of(
        world / "real", {"x": world / "x"}, tmp_path / "out", *words, f"downstream.synthetic.x={tmp_path}"
    )
    assert evaluate.open_units(apart) > 2 * 2 * 2 * 2
