"""A grid of trainings as a Slurm array of which one task is killed, and as tasks of one machine: the same report."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_shard
from ccmdist.data.writer import write_set
from tests.slurm.small_cluster import ROOT, task_pid
from tests.slurm.test_slurm_arrays import ccmdist, contents

pytestmark = pytest.mark.slurm

NUM_WORKERS, KILLED = 2, 1
TRAINS = r"(diagnosis|segmentation), \S+: fold \d, seed \d"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Settings of two arms, seeds, folds and tasks on phantoms of twelve subjects, and noisy copies of them."""
    root = tmp_path_factory.mktemp("grid")
    phantoms = {"subjects_per_group": 4, "frames_per_subject": 1, "val_fraction": 0, "test_fraction": 0.5}
    write_phantom_set(PhantomShardsConfig(out=root / "real", size_px=64, samples_per_shard=6, **phantoms))
    rng = np.random.default_rng(0)

    def drawn():
        origin = {"source_set_digest": "d", "seed": 3, "base_digest": "b", "adapter_digest": "untuned"}
        for entry in read_manifest(root / "real").shards:
            for triple in read_shard(root / "real", entry):
                noisy = np.clip(triple.image + rng.normal(0, 6, triple.image.shape), 0, 255).astype(np.uint8)
                about = {"source_key": triple.key, **origin, "denoise_steps": 8, "guidance_scale": 1.0}
                meta = replace(triple.meta, source="synthetic", labels={}, provenance=about)
                yield "test", replace(triple, key=f"{triple.key}-0000", image=noisy, meta=meta)

    write_set(root / "drawn", "synthetic", drawn(), 6, {"training": "untuned"})
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
