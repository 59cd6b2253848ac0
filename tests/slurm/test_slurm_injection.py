"""What a user or a config says is data: on a real Slurm, none of it runs and none of it changes the job."""

import json

import pytest

from ccmdist.cluster.job_folder import JobFolder
from tests.distributed.small_world import data_overrides

pytestmark = pytest.mark.slurm

EVIL = 'x\'; touch marker #\n#SBATCH --comment=evil\n$(touch marker) `touch marker` "; touch marker; " \\'


def test_no_argument_runs_anything_or_adds_a_line_to_the_batch_script(cluster, project, world, tmp_path):
    words = [*data_overrides(world), f"data.cache={json.dumps(str(tmp_path / EVIL))}", "data.shards=nowhere"]
    job = project.sbatch("slurm/precompute.sh", "configs/precompute/tiny.yaml", *words)
    cluster.wait_for(job, "FAILED")
    assert cluster.exit_code(job) == 78
    folder = JobFolder(tmp_path / EVIL / "jobs" / job)
    assert json.loads(folder.about.read_text())["arguments"] == ["configs/precompute/tiny.yaml", *words]
    assert "nowhere" in project.log(f"{job}_0")
    told = cluster.run("scontrol", "show", "job", job)
    assert "Comment" not in told
    assert "JobName=ccmdist-precompute" in told
    assert not [path for place in (tmp_path, project.folder) for path in place.rglob("marker")]
