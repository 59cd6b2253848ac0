"""The demo as a user types it: the chain runs, training is preempted and resumed, the model learns to follow masks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.jobs.demo import NUM_STEPS, PREEMPTED_AT_STEP, held_out_losses

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
LOSS_FACTOR = 0.92
"""Held-out loss after training over that before it, at most."""
CLDICE_MARGIN = 0.5
"""By which clDice of found nerves against masks of held-out subjects beats that of the untuned model, at least."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Folder of a finished demo, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "ccmdist", "demo", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


@pytest.mark.timeout(600)
def test_training_is_preempted_by_one_rank_and_goes_on_where_it_stopped(demo):
    out, _ = demo
    done = PREEMPTED_AT_STEP + 1
    assert RunDirectory(out / "run").attempts() == [
        {"first_step": 0, "last_step": done},
        {"first_step": done, "last_step": NUM_STEPS},
    ]


def test_the_held_out_loss_falls_by_the_stated_factor(demo):
    first, last = held_out_losses(demo[0] / "run" / "tensorboard")
    assert last <= LOSS_FACTOR * first


def test_tuned_images_follow_the_masks_of_held_out_subjects_better_than_untuned_ones(demo):
    report = json.loads((demo[0] / "report" / "report.json").read_text())
    cldice = {name: one["adherence"]["cldice"] for name, one in report["synthetic"].items()}
    assert cldice["wdlora"] >= cldice["untuned"] + CLDICE_MARGIN


def test_the_demo_ends_with_a_table_and_the_paths_of_what_it_made(demo):
    out, stdout = demo
    told = stdout[stdout.index("nerves found in the images") :]
    for path in (out / "report/report.html", out / "run/adapter", out / "synthetic/wdlora"):
        assert str(path) in told
        assert path.exists()
    assert f"tensorboard --logdir {out}/run/tensorboard" in told


def test_tensorboard_shows_curves_histograms_and_pictures_without_overlap(demo):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(demo[0] / "run" / "tensorboard"), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    assert {"first_batch/mask_target_input", "samples/mask_real_sampled"} <= set(tags["images"])
    assert "sigma" in tags["histograms"]
    expected = {"loss/mean", "loss/max", "optim/lr", "optim/grad_norm", "time/images_per_s", "time/data_wait_share"}
    expected |= {"time/step_s", "memory/max_gib", "held_out/mean", "moved/magnitude/img_attn"}
    assert expected <= set(tags["scalars"])
    for tag in tags["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == sorted(set(steps)), f"{tag} overlaps after the resume"
