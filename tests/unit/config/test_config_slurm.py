"""What is asked of Slurm is validated before it can reach a batch file."""

import re

import pytest

from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError

REQUIRED = ["run=runs/a", "data.shards=shards/a", "data.model=models/a"]


def settings(*overrides):
    return load_for_slurm(TrainConfig, [], [*REQUIRED, *overrides])[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("slurm.job_name='a b'", "slurm.job_name: 'a b' is not a name: up to 64 of A-Z a-z 0-9 . _ - and no dash"),
        ("slurm.account=-x", "slurm.account: '-x' is not a name"),
        ('slurm.qos="a\\n#SBATCH --uid=0"', "slurm.qos: 'a\\n#SBATCH --uid=0' is not a name"),
        ("slurm.reservation=é", "slurm.reservation: 'é' is not a name"),
        (f"slurm.account={'x' * 65}", "is not a name: up to 64"),
        ("slurm.partition='gpu,,cpu'", "slurm.partition: 'gpu,,cpu' is not a list of names with one comma between two"),
        ("slurm.exclude='n1 n2'", "slurm.exclude: 'n1 n2' is not a list of nodes such as n1,n[3-5]"),
        ("slurm.constraint='a;b'", "slurm.constraint: 'a;b' is not a combination of features such as a100&nvlink"),
        ('slurm.comment="a\\u2028b"', "is not a comment: up to 128 printable characters on one line"),
        ("slurm.comment='a\\b'", "no backslash and no dash at the start"),
        (f"slurm.comment={'x' * 129}", "is not a comment: up to 128"),
        ("slurm.nodes=0", "slurm.nodes: should be greater than or equal to 1 (got 0)"),
        ("slurm.node=2", "slurm.node: no such field; did you mean 'nodes'?"),
        ("slurm=4", "slurm: should be a section of fields (got 4)"),
    ],
)
def test_what_could_change_a_batch_file_is_refused_with_its_place(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        settings(override)


@pytest.mark.parametrize(
    "override",
    [
        "slurm.partition='gpu,gpu-long'",
        "slurm.exclude='n1,rack2-n[003-5]'",
        "slurm.constraint='[rack1|rack2]&a100*2'",
        'slurm.comment="it\'s for Müller; #1 $(not run)"',
    ],
)
def test_what_clusters_use_is_taken_as_it_is(override):
    name = override.split("=")[0].removeprefix("slurm.")
    assert getattr(settings(override), name) == override.split("=", 1)[1].strip("'\"")


def test_a_process_drives_one_gpu_whichever_of_the_two_is_given():
    assert (settings().num_gpus_per_node, settings().num_tasks_per_node) == (1, 1)
    for override in ("slurm.tasks_per_node=8", "slurm.gpus_per_node=8"):
        slurm = settings(override)
        assert (slurm.num_gpus_per_node, slurm.num_tasks_per_node) == (8, 8)
    slurm = settings("slurm.tasks_per_node=8", "slurm.gpus_per_node=0")
    assert (slurm.num_gpus_per_node, slurm.num_tasks_per_node) == (0, 8)
    slurm = settings("slurm.gpus_per_node=0")
    assert (slurm.num_gpus_per_node, slurm.num_tasks_per_node) == (0, 1)
    with pytest.raises(ConfigError, match="slurm: tasks_per_node 4 and gpus_per_node 8 must be equal: a process"):
        settings("slurm.tasks_per_node=4", "slurm.gpus_per_node=8")
    with pytest.raises(ConfigError, match="gpu_type 'a100' is asked for with gpus_per_node=0"):
        settings("slurm.gpu_type=a100", "slurm.gpus_per_node=0")


def test_a_signal_that_would_come_before_the_start_is_refused():
    with pytest.raises(ConfigError, match="signal_lead_s 300 must be shorter than time_limit_min 5, which is 300 s"):
        settings("slurm.time_limit_min=5")
    assert settings("slurm.time_limit_min=6").signal_lead_s == 300


def test_problems_of_a_stage_and_of_its_job_are_told_at_once():
    with pytest.raises(ConfigError) as problem:
        load_for_slurm(TrainConfig, [], ["num_step=1", "slurm.nodes=0"])
    told = str(problem.value)
    assert told.startswith("TrainConfig and its slurm section from the command line:")
    assert all(text in told for text in ("run: is required", "num_step: no such field", "slurm.nodes: should be"))


def test_a_file_may_hold_both_and_an_override_wins(tmp_path):
    file = tmp_path / "lr=1.yaml"
    file.write_text("num_steps: 5\nslurm:\n  nodes: 2\n  partition: gpu\n")
    config, slurm = load_for_slurm(TrainConfig, *parted([str(file), *REQUIRED, "slurm.nodes=3"]))
    assert (config.num_steps, slurm) == (5, SlurmSettings(nodes=3, partition="gpu"))
