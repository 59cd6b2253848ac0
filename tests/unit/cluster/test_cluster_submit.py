"""A batch file says what was asked for, is the one that is shown beforehand, and submitting fails in one sentence."""

import os
import re
import stat

import pytest

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.submit import BatchJob, batch_text, outside_of_any_job, submit
from ccmdist.config.slurm import SlurmSettings
from ccmdist.errors import ConfigError, RunError


def flags(text):
    """What the #SBATCH lines of a batch file ask for."""
    return re.findall(r"^#SBATCH --(.*)$", text, re.MULTILINE)


def job(folder, num_array_tasks=1, is_collective=False, after=(), **slurm):
    return BatchJob("train", JobFolder(folder), SlurmSettings(**slurm), num_array_tasks, is_collective, after)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stands for Slurm: an sbatch that keeps what it gets, and what it was called with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\ncp "$1" {tmp_path}/got.sh\nenv >{tmp_path}/env\necho job 4242\n')
    (folder / "srun").write_text("#!/bin/sh\n")
    for path in folder.iterdir():
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_a_training_job_asks_for_what_its_settings_say(tmp_path):
    text = batch_text(
        job(
            tmp_path / "j",
            is_collective=True,
            nodes=2,
            gpus_per_node=8,
            gpu_type="a100",
            cpus_per_task=6,
            mem_gb=0,
            time_limit_min=90,
            signal_lead_s=60,
            partition="gpu,long",
            account="p-1",
            qos="q",
            reservation="r",
            constraint="a&b",
            exclude="n[1-2]",
            comment="it's #1",
        )
    )
    assert flags(text) == [
        "account=p-1",
        """comment='it'"'"'s #1'""",
        "constraint='a&b'",
        "cpus-per-task=6",
        "exclude='n[1-2]'",
        "gpus-per-node=a100:8",
        "job-name=ccmdist-train",
        "mem=0G",
        "nodes=2",
        "ntasks-per-node=8",
        "open-mode=append",
        f"output={tmp_path}/j/submitit/%j_0_log.out",
        "partition=gpu,long",
        "qos=q",
        "requeue",
        "reservation=r",
        "signal=USR2@60",
        "time=90",
    ]
    srun = next(line for line in text.splitlines() if line.startswith("srun "))
    assert "--open-mode=append --cpus-per-task=6 --kill-on-bad-exit=1 --wait=0 " in srun
    assert f"--output {tmp_path}/j/submitit/%j_%t_log.out" in srun
    assert text.rstrip().endswith("conclude $?")


def test_an_array_waits_for_the_jobs_before_it_and_its_tasks_do_not_end_each_other(tmp_path):
    text = batch_text(job(tmp_path / "j", 5, after=("7", "8"), gpus_per_node=0))
    assert {"array=0-4%5", "dependency=afterok:7:8", "kill-on-invalid-dep=yes"} <= set(flags(text))
    assert not any("gpu" in flag or "wckey" in flag for flag in flags(text))
    assert "--kill-on-bad-exit=0 " in text
    assert f"output={tmp_path}/j/submitit/%A_%a_0_log.out" in flags(text)


@pytest.mark.parametrize("num_array_tasks", [1, 3])
def test_what_is_submitted_is_what_was_shown(cluster, num_array_tasks):
    one = job(cluster / "a b'c", num_array_tasks, after=("7",))
    one.folder.path.mkdir()
    assert submit(one, print) == "4242"
    assert (cluster / "got.sh").read_text() == batch_text(one)
    assert stat.S_IMODE((one.folder.path / "submitit").stat().st_mode) == 0o700
    assert len(list((one.folder.path / "submitit").glob("4242*_submitted.pkl"))) == num_array_tasks


def test_a_batch_file_is_shown_where_there_is_no_slurm_but_not_submitted(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert batch_text(job(tmp_path / "j")).startswith("#!/bin/bash\n")
    with pytest.raises(RunError, match="sbatch: not found on this machine; submit on a node of the cluster, or look"):
        submit(job(tmp_path / "j"), print)
    assert not list(tmp_path.iterdir())


def test_a_refusal_of_sbatch_is_told_in_one_sentence(cluster):
    (cluster / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: x' >&2\nexit 1\n")
    (cluster / "j").mkdir()
    with pytest.raises(RunError) as problem:
        submit(job(cluster / "j"), print)
    assert str(problem.value) == (
        "sbatch refused the job: sbatch: error: invalid partition: x; see `sinfo` and the slurm settings"
    )


@pytest.mark.parametrize("name", ["a%jb", "a\\b", "a\nb", "a\u2028b", "a\x1bb"])
def test_a_folder_that_cannot_stand_in_a_batch_file_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"cannot stand in a batch file.*choose a folder whose path is of other"):
        batch_text(job(tmp_path / name))


def test_a_job_that_is_submitted_from_within_a_job_inherits_nothing_of_it(cluster, monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "SLURM_CONF", "SBATCH_ACCOUNT"):
        monkeypatch.setenv(name, "5")
    (cluster / "j").mkdir()
    submit(job(cluster / "j"), print)
    inherited = (cluster / "env").read_text().splitlines()
    assert "SLURM_CONF=5" in inherited
    assert "SBATCH_ACCOUNT=5" in inherited
    assert not [line for line in inherited if line.startswith(("SLURM_JOB_ID", "SLURM_NTASKS", "RANK"))]
    with pytest.raises(ZeroDivisionError), outside_of_any_job():
        assert "SLURM_JOB_ID" not in os.environ
        raise ZeroDivisionError
    assert os.environ["SLURM_JOB_ID"] == "5"


def test_variables_of_sbatch_do_not_win_over_what_was_asked_for(cluster, monkeypatch):
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT", "SBATCH_SIGNAL", "SBATCH_EXPORT"):
        monkeypatch.setenv(name, "5")
    (cluster / "j").mkdir()
    submit(job(cluster / "j", partition="gpu"), print)
    inherited = {line.partition("=")[0] for line in (cluster / "env").read_text().splitlines()}
    assert inherited & {f"SBATCH_{name}" for name in ("PARTITION", "ACCOUNT", "TIMELIMIT", "SIGNAL", "EXPORT")} == {
        "SBATCH_ACCOUNT",
        "SBATCH_EXPORT",
    }
    assert os.environ["SBATCH_PARTITION"] == "5"


def test_the_log_is_that_of_the_first_process(tmp_path):
    assert job(tmp_path).log("7") == tmp_path / "submitit" / "7_0_log.out"
    assert job(tmp_path, 2).log("7") == tmp_path / "submitit" / "7_0_0_log.out"
