"""A process knows who it is from a complete set of variables, or refuses."""

import pytest

from ccmdist.cluster.ranks import (
    Ranks,
    ranks_from_environment,
    rendezvous_from_environment,
    worker_from_environment,
)
from ccmdist.errors import RunError

SRUN = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}


def test_nobody_started_this_process_as_one_of_several():
    assert ranks_from_environment({}) is None


def test_ranks_come_from_a_launcher_or_from_srun():
    assert ranks_from_environment({"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}) == Ranks(1, 0, 2)
    assert ranks_from_environment(SRUN) == Ranks(3, 1, 4)


def test_a_batch_script_is_not_a_rank():
    assert ranks_from_environment(SRUN | {"SLURM_STEP_ID": "batch"}) is None
    assert ranks_from_environment(SRUN | {"SLURM_STEP_ID": "4294967291"}) is None
    assert ranks_from_environment({"SLURM_NTASKS": "4"}) is None


def test_the_shell_of_salloc_is_alone_although_it_is_told_the_tasks_of_its_allocation():
    """As LaunchParameters=use_interactive_step makes it."""
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "4294967290"}
    assert ranks_from_environment(shell) is None
    assert worker_from_environment(shell) == (0, 1)


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "WORLD_SIZE"])
def test_a_half_set_environment_is_refused_by_name(missing):
    values = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    with pytest.raises(RunError, match=f"set but not {missing}; unset them, or set all three"):
        ranks_from_environment({k: v for k, v in values.items() if k != missing})


def test_a_rank_beyond_the_world_is_refused():
    with pytest.raises(RunError, match="RANK 2 is not below WORLD_SIZE 2"):
        ranks_from_environment({"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"})


def test_workers_of_an_array_are_numbered_over_all_its_tasks():
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert worker_from_environment({}) == (0, 1)
    assert worker_from_environment(SRUN | array) == (2 * 4 + 3, 12)


def test_an_array_with_gaps_would_leave_work_to_nobody_and_is_refused():
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "2"}
    with pytest.raises(RunError, match=r"2 tasks from 3 to 7, expected no gap .* submit it as --array=0-1"):
        worker_from_environment(array | {"SLURM_ARRAY_TASK_MAX": "7"})
    assert worker_from_environment(array | {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MAX": "4"}) == (1, 2)


def test_a_single_task_such_as_an_interactive_shell_is_alone():
    assert ranks_from_environment(SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None


def test_ranks_that_were_not_told_where_to_meet_are_refused_with_the_line_that_tells_them():
    assert rendezvous_from_environment({"MASTER_ADDR": "n1", "MASTER_PORT": "1234"}) == "env://"
    with pytest.raises(RunError, match=r"MASTER_PORT are not both set.*export MASTER_ADDR=\$\(scontrol show hostnames"):
        rendezvous_from_environment({"MASTER_ADDR": "n1"})
