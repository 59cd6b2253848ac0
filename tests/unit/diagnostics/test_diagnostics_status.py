"""`ccmdist status` tells where a run stands, whatever was left behind, and changes nothing."""

import dataclasses
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from ccmdist.cli import exit_code
from ccmdist.diagnostics import status
from ccmdist.diagnostics.standing import standing
from ccmdist.diagnostics.status import show
from ccmdist.diagnostics.status_view import duration, line, page
from ccmdist.errors import RunError
from tests.unit.diagnostics.made_ledgers import Ledger, begin_set, killed, preempted, refused, straight, write

HERE = {"host": socket.gethostname(), "pid": os.getpid(), "job": ""}
GONE = {"host": socket.gethostname(), "pid": 2**22 + 1, "job": ""}  # above the largest process id of Linux
ELSEWHERE = {"host": "another-node", "pid": 1, "job": ""}
KEYS = {
    *("format", "kind", "run", "state", "detail", "step", "num_steps", "committed_step", "committed_age_s"),
    *("commit_every_steps", "quiet_s", "seconds_left", "holder", "slurm", "last_exit", "attempts"),
    *("attempts_without_progress", "goodput"),
}


def recent(ledger, age_s=0.0):
    """What moves a ledger's times so that its last line is ``age_s`` old."""
    return time.time() - age_s - ledger.now


def printed(now):
    """The page on a terminal of 80 columns, without colours."""
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(page(now))
    return console.export_text()


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Put a squeue on the PATH that answers with a given text."""

    def answer(text, code=0, stderr=""):
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "squeue").write_text(f"#!/bin/sh\nprintf '%s' '{text}'\nprintf '%s' '{stderr}' >&2\nexit {code}\n")
        (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    return answer


def test_a_finished_run_is_done(tmp_path):
    outcome = {"state": "done", "reason": "all 20 steps are done", "step": 20}
    now = standing(write(tmp_path, straight(), owner=GONE, outcome=outcome))
    assert (now.state, now.step, now.num_steps, now.committed_step) == ("done", 20, 20, 20)
    assert now.seconds_left == 0.0
    text = printed(now)
    assert "● done" in text
    assert "all 20 steps are done" in text
    assert "goodput      70.2% of 57 s" in text


def test_a_run_whose_holder_lives_here_is_running(tmp_path):
    now = standing(write(tmp_path, killed(), owner=HERE, shift_s=recent(killed())))
    assert (now.state, now.step, now.committed_step) == ("running", 18, 10)
    assert now.seconds_left == 2 * 2.0
    assert now.detail == f"process {os.getpid()} on {socket.gethostname()}"
    assert [attempt.state for attempt in now.attempts] == ["killed", "running"]
    text = printed(now)
    assert "killed; 4 steps lost" in text
    assert "2  10 → 18  31 s  n2    running" in text


def test_a_run_whose_holder_has_died_here_is_killed_at_once(tmp_path):
    now = standing(write(tmp_path, killed(), owner=GONE, shift_s=recent(killed())))
    assert (now.state, now.step) == ("killed", 10)
    assert "ended without a word; run the same command again to go on from the last commit" in now.detail
    assert now.goodput.num_failures == 2


def test_another_process_with_the_number_of_a_dead_holder_does_not_make_a_run_live(tmp_path):
    folder = write(tmp_path, killed(), owner=HERE)
    os.utime(folder / "owner.json", (1.0e9, 1.0e9))  # long before this process was born
    assert standing(folder).state == "killed"


def test_a_run_on_a_node_that_cannot_be_asked_lives_until_it_has_been_silent_too_long(tmp_path):
    folder = write(tmp_path, killed(), owner=ELSEWHERE, shift_s=recent(killed(), age_s=600))
    assert standing(folder).state == "running"
    for name in ("owner.json", "ledger.jsonl"):
        os.utime(folder / name, (1.0e9, 1.0e9))
    assert standing(folder).state == "running"
    write(folder, killed(), shift_s=recent(killed(), age_s=1900))
    for name in ("owner.json", "ledger.jsonl"):
        os.utime(folder / name, (1.0e9, 1.0e9))
    now = standing(folder)
    assert now.state == "killed"
    assert "process 1 on another-node has been silent for longer than 30 min" in now.detail


def test_a_stopped_run_waits_and_says_for_what(tmp_path):
    outcome = {"state": "requeue", "reason": "stopped by SIGUSR2", "step": 6}
    ledger = Ledger().attempt(0).steps(0, 6).commit(6).end("requeue", "stopped by SIGUSR2", 6)
    now = standing(write(tmp_path, ledger, owner=GONE, outcome=outcome))
    assert (now.state, now.detail, now.step) == ("waiting", "run the same command again to go on", 6)
    assert now.last_exit.reason == "stopped by SIGUSR2"
    assert "last exit    at step 6: stopped by SIGUSR2" in printed(now)


def test_a_refused_run_tells_the_whole_reason(tmp_path):
    reason = "step 12: the loss is not finite (samples: " + ", ".join(f"s-{i:04d}" for i in range(30)) + "); lower lr"
    folder = write(tmp_path, refused(), owner=GONE, outcome={"state": "refused", "reason": reason, "step": 12})
    now = standing(folder)
    assert (now.state, now.detail, now.step) == ("refused", reason, 10)
    assert "s-0029" in printed(now)


@pytest.mark.parametrize(
    ("answer", "state", "detail"),
    [
        ("PENDING|BeginTime||1:00:00", "waiting", "its ranks were killed; job 12 PENDING (BeginTime); it goes on by"),
        ("PENDING|JobHeldAdmin||1:00", "waiting", "(JobHeldAdmin); `scontrol release 12` lets it run"),
        ("RUNNING|None|n1|UNLIMITED", "running", "process 1 on another-node, job 12 RUNNING on n1"),
        ("RUNNING|None|n[1-2]|1:02:03", "running", "process 1 on another-node, job 12 RUNNING on n[1-2] 1:02:03 left"),
        ("", "killed", "process 1 on another-node ended without a word, job 12 is not in the queue; run"),
    ],
)
def test_slurm_says_whether_a_run_on_another_node_lives(tmp_path, squeue, answer, state, detail):
    squeue(answer)
    folder = write(tmp_path / "run", killed(), owner=ELSEWHERE | {"job": "12"}, shift_s=recent(killed()))
    now = standing(folder)
    assert now.state == state
    assert detail in now.detail
    assert now.slurm.job_id == "12"
    assert "UNLIMITED" not in now.detail


def test_a_stopped_run_under_slurm_goes_on_by_itself(tmp_path, squeue):
    squeue("PENDING|BeginTime||1:00:00")
    outcome = {"state": "requeue", "reason": "stopped by SIGUSR2", "step": 20}
    now = standing(write(tmp_path / "run", preempted(), owner=ELSEWHERE | {"job": "7"}, outcome=outcome))
    assert (now.state, now.detail) == ("waiting", "job 7 PENDING (BeginTime); it goes on by itself")


def test_a_controller_that_does_not_answer_is_no_proof_of_death(tmp_path, squeue):
    squeue("", code=1, stderr="slurm_load_jobs error: Unable to contact slurm controller")
    folder = write(tmp_path / "run", killed(), owner=ELSEWHERE | {"job": "12"}, shift_s=recent(killed()))
    assert (standing(folder).state, standing(folder).slurm) == ("running", None)
    squeue("", code=1, stderr="slurm_load_jobs error: Invalid job id specified")
    assert standing(folder).state == "killed"


def test_a_job_name_from_the_environment_is_never_an_option_of_squeue(tmp_path, squeue):
    squeue("RUNNING|None|n1|1:00")
    folder = write(tmp_path / "run", killed(), owner=ELSEWHERE | {"job": "12 --me"}, shift_s=recent(killed()))
    assert standing(folder).slurm is None


def test_a_holder_that_has_written_nothing_yet_does_not_revive_the_attempt_before(tmp_path):
    folder = write(tmp_path, killed(), owner=HERE)
    os.utime(folder / "ledger.jsonl", (1.0e9, 1.0e9))
    now = standing(folder)
    assert (now.state, now.step) == ("running", 10)
    assert [attempt.state for attempt in now.attempts] == ["killed", "killed"]


def test_restarts_without_progress_are_counted(tmp_path):
    ledger = Ledger().attempt(0).steps(0, 10).commit(10)
    for _ in range(3):
        ledger.attempt(10)
    now = standing(write(tmp_path, ledger, owner=GONE))
    assert now.attempts_without_progress == 3
    assert "in the last 3 attempts" in printed(now)


def test_many_attempts_do_not_make_a_long_page(tmp_path):
    ledger = Ledger()
    for step in range(0, 200, 10):
        ledger.attempt(step).steps(step, step + 10).commit(step + 10)
    text = printed(standing(write(tmp_path, ledger, owner=GONE, num_steps=300)))
    assert "1 - 14" in text
    assert len(text.splitlines()) < 32


def test_pages_fit_into_80_columns_and_show_names_as_they_are(tmp_path):
    folder = tmp_path / ("long-name-" * 8) / "run-[bold]-:smile:"
    now = standing(write(folder, refused(), owner=GONE, outcome={"state": "refused", "reason": "[red]x", "step": 1}))
    text = printed(now)
    assert max(map(len, text.splitlines())) <= 80
    assert "[red]x" in text
    assert text.startswith("╭─ ● refused  …")
    assert "name-/run-[bold]-:smile: ─╮" in text


def test_json_has_the_documented_keys(tmp_path, capsys):
    show(write(tmp_path, preempted(), owner=GONE), as_json=True, watch=False)
    values = json.loads(capsys.readouterr().out)
    assert values.keys() == KEYS
    assert values["format"] == 1
    assert values["goodput"]["buckets_s"]["queue"] == 30.0
    assert values["attempts"][0]["reason"] == "stopped by SIGUSR2"


def test_what_is_no_run_is_refused_with_a_remedy(tmp_path, capsys):
    with pytest.raises(RunError, match=r"there is no such folder; name the folder of a run"):
        standing(tmp_path / "none")
    with pytest.raises(RunError, match=r"is neither a training run nor a synthetic set; name the folder of a run"):
        standing(tmp_path)
    folder = write(tmp_path / "run", killed())
    with pytest.raises(RunError, match=rf"it lies inside the run {folder}: name that"):
        standing(folder / "checkpoints")
    assert exit_code(["status", str(tmp_path)]) == 78
    assert "is neither a training run" in capsys.readouterr().err


def test_a_job_that_was_submitted_and_has_not_begun_is_new(tmp_path, squeue):
    squeue("PENDING|Resources||1-00:00:00")
    (tmp_path / "jobs" / "31").mkdir(parents=True)
    (tmp_path / "jobs" / "31" / "job.json").write_text('{"stage": "train"}')
    now = standing(tmp_path)
    assert (now.state, now.detail) == ("new", "job 31 PENDING (Resources)")
    assert "job 31 PENDING" in printed(now)


def test_the_folder_of_another_stage_is_no_run(tmp_path):
    (tmp_path / "jobs" / "31").mkdir(parents=True)
    (tmp_path / "jobs" / "31" / "job.json").write_text('{"stage": "precompute"}')
    with pytest.raises(RunError, match="is neither a training run nor a synthetic set"):
        standing(tmp_path)


def test_a_synthetic_set_counts_its_batches(tmp_path):
    folder = begin_set(tmp_path / "set")
    (folder / "test-000000.tar").write_bytes(b"two batches")
    now = standing(folder)
    assert (now.kind, now.state, now.step, now.num_steps) == ("synthetic set", "running", 2, 3)
    assert "batch        2/3" in printed(now)
    assert line(now) == "running  batch 2/3"
    for path in (folder, folder / "batches"):
        os.utime(path, (1.0e9, 1.0e9))
    now = standing(folder)
    assert (now.state, now.detail) == (
        "waiting",
        "1 of 3 batches are open; the same command, or an array of it, draws them",
    )
    (folder / "batches" / "test-000002.tar").write_bytes(b"the last batch")
    (folder / "manifest.json").write_text("{}")
    now = standing(folder)
    assert (now.state, now.step, now.detail) == ("done", 3, "6 images in 2 shards")
    assert dataclasses.asdict(now).keys() == KEYS


def test_a_look_changes_nothing_in_the_folder(tmp_path):
    folder = write(tmp_path, killed(), owner=HERE)
    before = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))}
    folder.chmod(0o555)
    standing(folder)
    folder.chmod(0o755)
    assert {path: path.stat().st_mtime_ns for path in sorted(tmp_path.rglob("*"))} == before


def test_a_look_does_not_touch_the_lock_of_a_run(tmp_path):
    program = (
        "import sys; from pathlib import Path; from ccmdist.cluster.run_directory import RunDirectory\n"
        "RunDirectory(Path(sys.argv[1])).hold(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        assert standing(tmp_path).state == "running"
        holder.kill()
    assert standing(tmp_path).state == "killed"


@pytest.mark.parametrize("name", ["owner.json", "outcome.json", "config.json", "attempts.json"])
@pytest.mark.parametrize("text", ["", '{"state": "do', "\x00\x00\x00", "[]", "null", '{"a": 1}'])
def test_a_file_that_is_not_whole_counts_as_not_there(tmp_path, name, text):
    folder = write(tmp_path, killed(), owner=GONE, outcome={"state": "requeue", "reason": "r", "step": 10})
    (folder / name).write_text(text)
    printed(standing(folder))


@settings(max_examples=150)
@given(st.data())
def test_every_prefix_of_a_ledger_has_a_page(data):
    ledger = data.draw(st.sampled_from([straight(), preempted(), killed(), refused()]))
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), ledger, owner=data.draw(st.sampled_from([HERE, GONE, ELSEWHERE])))
        content = (folder / "ledger.jsonl").read_bytes()
        (folder / "ledger.jsonl").write_bytes(content[: data.draw(st.integers(0, len(content)))])
        now = standing(folder)
        assert "step" in line(now)
        assert max(map(len, printed(now).splitlines())) <= 80
        json.dumps(dataclasses.asdict(now), allow_nan=False)
        if now.goodput is not None:
            assert sum(now.goodput.buckets_s.values()) == pytest.approx(now.goodput.wall_s)


def test_a_watch_on_a_pipe_adds_a_line_per_change_and_ends_with_the_run(tmp_path, monkeypatch, capsys):
    done = {"state": "done", "reason": "all 20 steps are done", "step": 20}
    begun = Ledger().attempt(0).steps(0, 10)
    # Each sleep lets something happen: nothing, ten steps more, the end.
    changes = [lambda: None, lambda: write(tmp_path, straight(), owner=HERE)]
    changes.append(lambda: write(tmp_path, straight(), owner=HERE, outcome=done))
    monkeypatch.setattr(status.time, "sleep", lambda seconds: changes.pop(0)())
    show(write(tmp_path, begun, owner=HERE), as_json=False, watch=True)
    lines = [text[9:] for text in capsys.readouterr().out.splitlines()]
    assert [text.split("  ")[0:2] for text in lines] == [
        ["running", "step 10/20"],
        ["running", "step 20/20"],
        ["done", "step 20/20"],
    ]


def test_ctrl_c_ends_a_watch_without_an_error(tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", interrupted)
    assert exit_code(["status", str(write(tmp_path, killed(), owner=HERE)), "--watch"]) == 0


def test_status_imports_no_torch():
    program = "import sys, ccmdist.diagnostics.status; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.0, "0 s"), (0.42, "0.42 s"), (9.99, "10 s"), (59.7, "1 min"), (185, "3 min 05 s")),
        *((7620, "2 h 07 min"), (8 * 3600, "8 h"), (273600, "3 d 04 h")),
    ],
)
def test_durations_are_told_in_two_units(seconds, text):
    assert duration(seconds) == text
