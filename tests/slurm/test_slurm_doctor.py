"""Doctor on a real cluster: fit where it is fit, what it lacks named, and what lies between nodes tried from inside."""

import json
import sys

import pytest

from ccmdist.diagnostics.checks import slurm
from ccmdist.diagnostics.checks.finding import Request

pytestmark = pytest.mark.slurm

DOCTOR = (sys.executable, "-m", "ccmdist", "doctor", "--json")


def rows(told):
    """What was looked at -> its finding."""
    return {row["what"]: row for row in json.loads(told)["findings"]}


def test_inside_a_job_the_nodes_the_file_system_and_the_ranks_are_tried(cluster):
    """Both tasks are asked, one answers, and starts tasks of its own on every node of the job."""
    told = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", *DOCTOR, "--require", "slurm,ranks")
    found = rows(told)
    assert json.loads(told)["exit_code"] == 0
    assert found["version"]["state"] == "OK"
    assert found["partitions"]["found"] == "longest job: gpu UNLIMITED, high UNLIMITED"
    assert found["preemption"]["found"] == "gpu REQUEUE"
    assert found["preemption signal"]["found"] == "a preempted job gets its --signal"
    assert found["accounting"]["found"] == "sacct answers"
    assert found["here on 2 nodes"]["state"] == "OK"
    assert "locks hold" in found["here on 2 nodes"]["found"]
    assert found["all-reduce"]["found"].startswith("a rank on each of 2 nodes, which meet at n1, on gloo over ")


def test_a_cluster_that_lacks_what_a_run_relies_on_is_told_so(other_cluster, monkeypatch):
    poor = other_cluster(USER_SIGNAL=0, ACCOUNTING="none", EXTRA="JobRequeue=0", GPUS=0, GRACE=7)
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, poor.environment[name])
    found = {finding.what: finding for finding in slurm.check(Request(frozenset({"slurm"})))}
    assert found["preemption signal"].state == "WARN"
    assert "SlurmctldParameters=preempt_send_user_signal" in found["preemption signal"].remedy
    assert found["accounting"].found == "sacct: Slurm accounting storage is disabled"
    assert found["requeue"].found.startswith("JobRequeue=0; ")
    config = slurm.parse_config(poor.run("scontrol", "show", "config"))
    partitions = slurm.parse_partitions(poor.run("scontrol", "show", "partition", "--oneliner"))
    assert {name: slurm.graces(values, config) for name, values in partitions.items()} == {"gpu": 7, "high": None}


def test_a_controller_that_does_not_answer_is_a_finding(monkeypatch, tmp_path):
    """What a login node sees while its controller is down, or when its configuration is gone."""
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    monkeypatch.setattr(slurm, "TIMEOUT_S", 2.0)
    (finding,) = slurm.check(Request(frozenset({"slurm"})))
    assert finding.state == "MISS"
    assert finding.found.startswith("does not answer: ")
