"""Eight array tasks draw a set on a real Slurm while some are killed at random: no gap, no duplicate, same bytes."""

import os
import random
import signal

import pytest

from tests.distributed.small_world import data_overrides
from tests.slurm.small_cluster import task_pid
from tests.slurm.test_slurm_arrays import ccmdist, contents

pytestmark = [pytest.mark.slurm, pytest.mark.drill]

NUM_WORKERS, NUM_KILLS, SEED = 8, 5, 0
DRAWN = r"batch \d+: "


@pytest.mark.timeout(1800)
def test_eight_workers_of_whom_five_are_killed_draw_the_set_of_a_single_one(cluster, project, world, tmp_path):
    words = [*data_overrides(world), "images_per_mask=48", "batch_size=2", "batches_per_shard=4"]
    words += ["denoise_steps=16", "guidance_scale=1"]
    script = ["slurm/synthesize.sh", "configs/synthesize/tiny.yaml", *words, f"out={tmp_path}/set"]
    job = project.sbatch(f"--array=0-{NUM_WORKERS - 1}", *script)
    victims = random.Random(SEED).sample(range(NUM_WORKERS), NUM_KILLS)
    for task in victims:
        project.wait_for_line(f"{job}_{task}", DRAWN)
        os.kill(task_pid(job, SLURM_ARRAY_TASK_ID=task), signal.SIGKILL)
    for task in victims:
        cluster.wait_until_back(f"{job}_{task}", 0)
    cluster.wait_for(job, "COMPLETED")
    restarts = [cluster.restarts(f"{job}_{task}") for task in range(NUM_WORKERS)]
    assert restarts == [int(task in victims) for task in range(NUM_WORKERS)]
    assert "are there once" in ccmdist("shards", "verify", tmp_path / "set", "--plan")
    ccmdist("synthesize", "configs/synthesize/tiny.yaml", *words, f"out={tmp_path}/alone")
    for pattern in ("*.tar", "*.json"):
        assert contents(tmp_path / "set", pattern) == contents(tmp_path / "alone", pattern)
