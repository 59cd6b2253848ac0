"""A controller's settings are read as scontrol prints them; what they mean for a run is told with its remedy."""

import json

import pytest

from ccmdist.diagnostics.checks import lead, slurm
from ccmdist.diagnostics.checks.lead import Measured, measure
from ccmdist.diagnostics.checks.slurm import graces, judge, parse_config, parse_partitions, preempts, sends_signal
from tests.unit.diagnostics.doctored import one, request, settings

CONFIG = """Configuration data as of 2026-11-25T23:09:49
AccountingStorageType   = accounting_storage/none
AuthInfo                = socket=/run/munge.sock,cred_expire=5
ClusterName             = sandbox
GresTypes               = gpu
JobRequeue              = 1
KillWait                = 3 sec
PreemptMode             = REQUEUE
PreemptType             = preempt/partition_prio
PreemptParameters       = (null)
SlurmctldHost[0]        = vm(127.0.0.1)
SlurmctldParameters     = preempt_send_user_signal
SLURM_VERSION           = 22.05.8

Slurmctld(primary) at vm is UP
"""
PARTITIONS = (
    "PartitionName=gpu AllowGroups=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE GraceTime=20 Hidden=NO "
    "MaxTime=1-00:00:00 OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalNodes=4 TRES=cpu=128,mem=1000G\n"
    "PartitionName=high AllowGroups=ALL GraceTime=0 MaxTime=UNLIMITED PreemptMode=OFF State=UP TRES=cpu=128\n"
)


def judged(replace=(), partitions=PARTITIONS):
    text = CONFIG
    for old, new in replace:
        assert old in text
        text = text.replace(old, new)
    return list(judge(parse_config(text), parse_partitions(partitions)))


def test_a_good_cluster_gives_no_warning():
    findings = judged()
    assert {finding.state for finding in findings} == {"OK"}
    assert one(findings, "version").found == "22.05.8, cluster sandbox"
    assert one(findings, "partitions").found == "longest job: gpu 1-00:00:00, high UNLIMITED"
    assert one(findings, "requeue").found == "JobRequeue=1; a requeued job waits about 5 s"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("SlurmctldParameters", "preempt_send_user_signal", True),
        ("SlurmctldParameters", "enable_configless,preempt_send_user_signal", True),
        ("PreemptParameters", "reorder_count=2,send_user_signal", True),
        ("SlurmctldParameters", "enable_configless", False),
        ("PreemptParameters", "no_send_user_signal_please", False),
    ],
)
def test_the_signal_of_a_preempted_job_is_found_in_old_and_new_slurm(name, value, expected):
    assert sends_signal({name: value}) is expected


def test_a_cluster_that_preempts_without_the_jobs_signal_is_told_what_to_do():
    finding = one(judged([("preempt_send_user_signal", "(null)")]), "preemption signal")
    assert (finding.state, finding.found) == ("WARN", "preempt_send_user_signal is not set")
    assert "ask the site for SlurmctldParameters=preempt_send_user_signal" in finding.remedy
    assert "export SUBMITIT_PREEMPT_SIGNAL=TERM" in finding.remedy


def test_without_preemption_no_signal_is_asked_for():
    findings = judged([("preempt/partition_prio", "preempt/none")])
    assert one(findings, "preemption").found == "off: jobs end at their time limit alone"
    assert not [finding for finding in findings if finding.what == "preemption signal"]


def test_jobs_that_are_cancelled_when_preempted_do_not_come_back():
    findings = judged(partitions=PARTITIONS.replace("PreemptMode=REQUEUE", "PreemptMode=CANCEL"))
    assert (one(findings, "preemption").state, one(findings, "preemption").found) == ("WARN", "gpu CANCEL")


def test_a_partition_without_a_mode_of_its_own_has_that_of_the_cluster():
    config = parse_config(CONFIG)
    assert preempts({}, config) == "REQUEUE"
    assert preempts({"PreemptMode": "GANG,SUSPEND"}, config) == "SUSPEND"
    assert preempts({"PreemptMode": "OFF"}, config) == ""
    partitions = parse_partitions(PARTITIONS)
    assert {name: graces(values, config) for name, values in partitions.items()} == {"gpu": 20, "high": None}


def test_a_cluster_that_does_not_requeue_by_itself_and_waits_for_credentials_is_told():
    finding = one(judged([("JobRequeue              = 1", "JobRequeue = 0"), (",cred_expire=5", "")]), "requeue")
    assert (finding.state, finding.found) == ("WARN", "JobRequeue=0; a requeued job waits about 120 s")
    assert finding.remedy.startswith("keep --requeue")


def test_a_cluster_without_gpus_and_one_without_partitions_are_told():
    assert one(judged([("GresTypes               = gpu", "GresTypes = (null)")]), "GPUs").state == "WARN"
    assert one(judged(partitions=""), "partitions").state == "MISS"


def test_without_slurm_there_is_one_finding_that_is_missing_only_if_it_was_asked_for(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    (finding,) = slurm.check(request())
    assert (finding.state, finding.found) == ("WARN", "does not answer: scontrol is not installed")
    (finding,) = slurm.check(request("slurm"))
    assert finding.state == "MISS"


def section(name, seconds, step, last_step):
    return {
        "event": "section",
        "section": name,
        "seconds": seconds,
        "step": step,
        "last_step": last_step,
        "attempt": 0,
        "time": 1.0,
    }


LEDGER = [
    {"event": "attempt", "attempt": 0, "step": 0, "time": 0.0, "began": 0.0},
    section("startup", 500.0, 0, 0),
    section("data_wait", 10.0, 0, 10),
    section("compute", 110.0, 0, 10),
    section("compute", 40.0, 10, 20),
    section("validation", 30.0, 20, 20),
    {"event": "commit", "attempt": 0, "time": 2.0, "step": 20, "seconds": 60.0},
    {"event": "commit", "attempt": 0, "time": 2.0, "step": 30, "seconds": 20.0},
]


def advised(tmp_path, *overrides, partitions=None, events=LEDGER):
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    config = settings(f"run={tmp_path}", *overrides)
    return list(lead.check(request(config=config), {"KillWait": "30 sec"}, partitions or {}))


def test_the_lead_that_a_stop_needs_follows_from_the_longest_step_validation_and_save():
    assert measure(LEDGER) == Measured(save_s=60.0, step_s=12.0, validation_s=30.0)
    assert measure(LEDGER).needed_s == 170  # 12 + 30 + 1.5 * 60 + 30, rounded up
    assert measure(LEDGER[:6]) is None  # nothing was saved yet


def test_a_signal_that_comes_too_late_is_told_with_the_number_to_set(tmp_path):
    finding = one(advised(tmp_path, "slurm.signal_lead_s=120"), "signal lead")
    assert finding.state == "WARN"
    assert finding.found == ("120 s (slurm.signal_lead_s); step 12.0 s, validation 30.0 s, save 60.0 s: 170 s needed")
    assert "--signal=USR2@170 in slurm/train.sh, or slurm.signal_lead_s=170" in finding.remedy
    assert one(advised(tmp_path, "slurm.signal_lead_s=170"), "signal lead").state == "OK"


def test_a_grace_that_is_too_short_is_told_for_the_partitions_that_preempt(tmp_path):
    finding = one(advised(tmp_path, partitions={"gpu": 20, "long": 600, "high": None}), "grace")
    assert (finding.state, finding.found) == ("WARN", "GraceTime of gpu 20 s, then KillWait 30 sec")
    assert "GraceTime=170" in finding.remedy


def test_a_hung_rank_should_end_itself_before_slurm_does(tmp_path):
    findings = advised(tmp_path, "slurm.signal_lead_s=300", "forced_exit_s=600")
    assert one(findings, "forced exit").remedy.startswith("set forced_exit_s=270: ")
    findings = advised(tmp_path, "slurm.signal_lead_s=300", "forced_exit_s=270")
    assert not [finding for finding in findings if finding.what == "forced exit"]


def test_the_lead_is_read_from_the_batch_script_where_no_setting_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/train.sh").write_text("#!/bin/bash\n#SBATCH --requeue --signal=B:USR2@240 --time=1:00\n")
    assert lead.planned(request()) == (240, "slurm/train.sh")
    assert lead.planned(request(config=settings("slurm.nodes=2")))[1] == "slurm.signal_lead_s"


def test_before_the_first_save_the_lead_is_shown_and_nothing_is_claimed(tmp_path):
    finding = one(advised(tmp_path, "slurm.signal_lead_s=120", events=[]), "signal lead")
    assert finding.state == "OK"
    assert "no save was measured yet" in finding.found


def test_a_timeout_that_a_slow_step_may_reach_is_told_with_the_one_to_set(tmp_path):
    advised(tmp_path)
    config = settings(f"run={tmp_path}", "timeouts.step_min=0.5", "timeouts.checkpoint_min=4")
    (finding,) = lead.timeouts(config)
    assert finding.state == "WARN"
    assert finding.found == "step 12.0 of 30 s, validation 30.0 of 1800 s, checkpoint 60.0 of 240 s"
    assert finding.remedy.startswith("set timeouts.step_min=1 timeouts.checkpoint_min=5: ")
    (finding,) = lead.timeouts(settings(f"run={tmp_path}"))
    assert finding.state == "OK"
    assert list(lead.timeouts(settings(f"run={tmp_path}/none"))) == []
