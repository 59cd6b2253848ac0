"""A grid of trainings as a Slurm array of which one task is killed, and as tasks of one machine: the same report."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from tests.slurm.small_cluster import ROOT, task_pid
from tests.slurm.test_slurm_arrays import ccmdist, contents
from tests.unit.evaluation.downstream.small_sets import draw, phantoms

pytestmark = pytest.mark.slurm

NUM_WORKERS, KILLED = 2, 1
TRAINS = r"(diagnosis|segmentation), \S+: fold \d, seed \d"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Settings of two arms, seeds, folds and tasks on phantoms of twelve subjects, and noisy copies of them."""
    root = tmp_path_factory.mktemp("grid")
    phantoms(root / "real", 4, frames_per_subject=1, val_fraction=0, test_fraction=0.5, samples_per_shard=6)
    draw(root / "real", root / "drawn")
    grid = ["arms=[real,'NAME:0.5']", "num_seeds=2", "num_folds=2"]
    grid += [f"networks.{one}" for one in ("size_px=32", "num_steps=12", "validate_every_steps=6", "batch_size=6")]
    grid += ["networks.unet_channels=[4,8]", "networks.lrs=[0.001]"]
    sets = [f"real={root}/real", f"synthetic.wdlora={root}/drawn", "memorisation=null", "num_grid_images=1"]
    return [*sets, "num_bootstrap=100", *(f"downstream.{one}" for one in grid)]


def report(folder):
    """Its bytes but for the time."""
    return re.sub(rb'"made_at": "[^"]*"', b"", (folder / "report.json").read_bytes())


def run_locally(words):
    """Two processes of this machine share the grid, and a third one reports."""
    command = [sys.executable, "-m", "ccmdist", "evaluate", "configs/evaluate/tiny.yaml", *words]
    shares = [
        os.environ | {"SLURM_ARRAY_TASK_ID": str(worker), "SLURM_ARRAY_TASK_COUNT": "2", "OMP_NUM_THREADS": "1"}
        for worker in range(2)
    ]
    workers = [subprocess.Popen(command, cwd=ROOT, env=share, stderr=subprocess.DEVNULL) for share in shares]
    assert [worker.wait() for worker in workers] == [0, 0]
    ccmdist(*command[3:])


@pytest.mark.timeout(600)
def test_a_grid_of_which_a_task_was_killed_gives_the_report_of_local_tasks(cluster, project, words, tmp_path):
    out, array = tmp_path / "report", tmp_path / "array"
    words = [*words, f"out={out}"]
    script = ["slurm/evaluate.sh", "configs/evaluate/tiny.yaml", *words]
    job = project.sbatch(f"--array=0-{NUM_WORKERS - 1}", *script)
    project.wait_for_line(f"{job}_{KILLED}", TRAINS)
    os.kill(task_pid(job, SLURM_ARRAY_TASK_ID=KILLED), signal.SIGKILL)
    cluster.wait_until_back(f"{job}_{KILLED}", 0)
    cluster.wait_for(job, "COMPLETED")
    assert [cluster.restarts(f"{job}_{task}") for task in range(NUM_WORKERS)] == [0, 1]
    assert not (out / "report.json").exists()
    cluster.wait_for(project.sbatch(*script), "COMPLETED")

    out.rename(array)  # the report names its own folder
    run_locally(words)
    cells = contents(array / "downstream", "*.json")
    assert len(cells) == 16
    assert cells == contents(out / "downstream", "*.json")
    assert report(array) == report(out)
    tasks = json.loads((array / "report.json").read_text())["downstream"]["tasks"]
    assert [(task["task"], len(task["arms"]), task["num_folds"], task["num_seeds"]) for task in tasks] == [
        ("diagnosis", 2, 2, 2),
        ("segmentation", 2, 2, 2),
    ]
