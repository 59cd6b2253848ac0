"""What slurm/job.sh does on clusters that are not like the one of the tests, told by programs that stand for theirs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUBS = """set -euo pipefail
cd "$PLACE"
. slurm/job.sh
scontrol() { echo "scontrol $*" >>calls; }
squeue() { echo "RUNNING None"; }
srun() { printf '%s ' srun "$@" >>calls; }
sleep() { echo "sleep $*" >>calls; }
AS_SUBMITTED="sbatch slurm/train.sh again" CCMDIST_JOB=$PWD/job STAGE=train OPTIONS=() SCRIPTS=slurm
JOB_LINK=slurm/logs/here-15.job
"""


@pytest.fixture
def bash(tmp_path):
    """Run lines after those that stand for a cluster; what the process said, and what it called."""
    (tmp_path / "slurm").mkdir()
    for name in ("job.sh", "env.sh"):
        (tmp_path / "slurm" / name).write_text((ROOT / "slurm" / name).read_text())

    def run(lines, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "CCMDIST"))}
        ours = {"PLACE": str(tmp_path), "SLURM_JOB_ID": "15"}
        ours |= {"SLURM_JOB_NODELIST": "n1", "CCMDIST_VENV": sys.prefix}
        done = subprocess.run(
            ["bash", "-c", STUBS + lines], env=kept | ours | environment, capture_output=True, text=True, check=False
        )
        calls = tmp_path / "calls"
        return done, calls.read_text() if calls.exists() else ""

    return run


def test_a_controller_that_does_not_answer_is_asked_again(bash):
    refuse = """scontrol() {
        [ "$1" = requeue ] || return 0
        echo "scontrol $*" >>calls
        (($(grep -c scontrol calls) > 2)) || { echo "Unable to contact slurm controller (connect failure)" >&2; false; }
    }
    """
    done, calls = bash(refuse + "conclude 75")
    assert calls.splitlines() == [
        "scontrol requeue 15",
        "sleep 10",
        "scontrol requeue 15",
        "sleep 20",
        "scontrol requeue 15",
    ]
    assert done.returncode == 75
    assert "it starts again by itself" in done.stderr


def test_a_refusal_is_not_asked_for_twice(bash):
    done, calls = bash('scontrol() { [ "$1" = requeue ] && echo "Access/permission denied" && false; }\nconclude 75')
    assert "sleep" not in calls
    assert done.returncode == 75
    assert "cannot be put back into the queue (Access/permission denied); to go on:" in done.stderr


@pytest.mark.parametrize(("restarts", "is_put_back"), [(0, False), (1, True)])
def test_a_task_of_an_array_asks_for_itself_alone(bash, restarts, is_put_back):
    """The job whose id is the array's: asked by that id, Slurm would tell of all tasks."""
    told = f"""scontrol() {{
        case $* in
            "show job 15_3") echo "Requeue=1 Restarts={restarts} BatchFlag=1" ;;
            "show job 15") printf 'Requeue=1 Restarts=%s\\n' 0 1 2 ;;
        esac
    }}
    """
    array = {"SLURM_ARRAY_JOB_ID": "15", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "3"}
    done, _ = bash(told + "conclude 75", **array)
    assert ("Slurm has put the job back" in done.stderr) is is_put_back
    assert "syntax error" not in done.stderr


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (75, 75), (78, 78), (137, 70)])
def test_a_log_that_takes_nothing_more_does_not_change_how_a_job_ends(bash, code, ends):
    done, _ = bash(f"exec 2>/dev/full\nconclude {code}")
    assert done.returncode == ends


def test_those_that_still_work_are_not_ended_by_the_wait_time_of_a_site(bash):
    _, calls = bash("run_tasks 0")
    words = "srun --kill-on-bad-exit=0 --wait=0 python3 -m ccmdist train slurm/logs/here-15.job/config.json"
    assert calls.startswith(words)


def test_what_a_site_runs_may_name_variables_that_are_not_set(bash, tmp_path):
    with (tmp_path / "slurm" / "env.sh").open("a") as env:
        env.write('export LD_LIBRARY_PATH="lib:$NOT_SET"\n')
    done, _ = bash('enter; echo "$LD_LIBRARY_PATH"; echo "$NOT_SET_EITHER"')
    assert done.stdout == "lib:\n"
    assert "NOT_SET_EITHER: unbound variable" in done.stderr


def test_packages_that_modules_name_are_found_after_the_frozen_code(bash, tmp_path):
    lines = 'enter; in_environment() { :; }; start; printf "%s\\n" "$PYTHONPATH"'
    assert bash(lines, PYTHONPATH="/apps/torch")[0].stdout == f"{tmp_path}/job/code:/apps/torch\n"
    assert bash(lines, PYTHONPATH="")[0].stdout == f"{tmp_path}/job/code\n"


def test_a_container_sees_no_packages_of_the_host(bash, tmp_path):
    lines = 'apptainer() { :; }; enter; start; printf "%s\\n" "$PYTHONPATH"'
    told = bash(lines, PYTHONPATH="/apps/torch", CCMDIST_CONTAINER="image.sif")[0].stdout
    assert told == f"{tmp_path}/job/code\n"


def test_each_start_of_a_job_meets_at_another_port(bash):
    ports = [
        int(bash('set_rendezvous; echo "$MASTER_PORT"', SLURM_RESTART_COUNT=str(number))[0].stdout)
        for number in range(4)
    ]
    assert len(set(ports)) == 4
    assert all(10000 <= port < 25000 for port in ports)


def test_an_environment_of_conda_has_nothing_to_activate_and_will_do(bash, tmp_path):
    python = tmp_path / "conda env" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\n")
    python.chmod(0o755)
    done, _ = bash("enter; cd /; command -v python3", CCMDIST_VENV="conda env")
    assert done.stdout == f"{python}\n"


@pytest.mark.parametrize(("code", "restarts", "ends"), [(78, 0, 78), (70, 0, 70), (70, 3, 70), (143, 9, 75)])
def test_a_job_that_cannot_begin_comes_back_unless_it_was_refused_or_has_tried_enough(bash, code, restarts, ends):
    done, calls = bash(f"give_up {code}", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == ends
    assert ("scontrol requeue 15" in calls) == ((code, restarts) in {(70, 0), (143, 9)})


def test_nobody_can_guess_where_code_is_loaded_from(bash):
    done, _ = bash('set_rendezvous; echo "$TORCH_EXTENSIONS_DIR"; set_rendezvous; echo "$TORCH_EXTENSIONS_DIR"')
    first, second = done.stdout.splitlines()
    assert first != second
    assert first.startswith("/tmp/ccmdist-15-")


def test_who_asks_for_the_requeue_outlives_it(bash):
    ended = """scontrol() { [ "$1" != requeue ] || { echo "scontrol $*" >>calls; kill -TERM "$BASHPID"; }; }
    """
    done, calls = bash(ended + "conclude 75")
    assert calls.splitlines() == ["scontrol requeue 15"]
    assert "it starts again by itself" in done.stderr
    assert done.returncode == 75
