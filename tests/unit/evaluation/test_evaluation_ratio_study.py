"""configs/evaluate/ratio_study.yaml: one command plans the grid of a dose-response, and tells where images lack."""

from collections import Counter
from pathlib import Path

import pytest

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load
from ccmdist.evaluation.downstream.grid import planned, units
from ccmdist.evaluation.sets import open_sets
from tests.unit.evaluation.downstream.small_sets import draw, phantoms, trained_on

CONFIGS = Path(__file__).parents[3] / "configs" / "evaluate"
ARMS = ["real", "wdlora:0.5", "wdlora:1", "wdlora:2", "wdlora:5", "only wdlora"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Phantoms, images for the masks of the test split, and eight for every mask of the train split."""
    root = tmp_path_factory.mktemp("sets")
    # Twelve subjects of each group that no generator was trained on, for five folds that test two or more.
    manifest = phantoms(root / "real", 40, frames_per_subject=1, test_fraction=0.15, val_fraction=0.15)
    for name, split, num in (("tested", "test", 1), ("trained", "train", 8)):
        subjects = {subject for shard in manifest.of_split(split) for subject in shard.subjects}
        draw(root / "real", root / name, trained_on(manifest), num, lambda one, who=subjects: one.meta.subject in who)
    return root


def study(sets, out, train="trained"):
    overrides = [f"out={out}", f"real={sets}/real", f"synthetic.wdlora={sets}/tested"]
    files = [CONFIGS / "ccm.yaml", CONFIGS / "ratio_study.yaml"]
    return load(EvaluateConfig, files, [*overrides, f"downstream.synthetic.wdlora={sets}/{train}"])


def test_the_study_trains_every_ratio_in_every_fold_with_every_seed(sets, tmp_path):
    config = study(sets, tmp_path)
    opened = open_sets(config)
    grid = planned(opened, config.downstream)
    assert grid.left_out == ()
    for task in grid.tasks:
        assert [arm.text for arm in task.arms] == ARMS
        times = Counter((cell.arm.text, cell.fold.number) for cell in task.cells)
        assert times == {(arm, fold): 5 for arm in ARMS for fold in range(5)}
    assert [task.task for task in grid.tasks] == ["diagnosis", "segmentation"]
    assert len(units(opened)) == 300


def test_a_ratio_for_which_images_lack_is_left_out_and_says_how_many_it_takes(sets, tmp_path):
    config = study(sets, tmp_path, train="tested")
    left_out = planned(open_sets(config), config.downstream).left_out
    assert [one.what for one in left_out if one.what.startswith("diagnosis")] == [
        f"diagnosis, arm {arm}" for arm in ARMS[1:5]
    ]
    assert all("are needed" in one.reason for one in left_out)
