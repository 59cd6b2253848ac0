"""Doctor names what is wrong and what to do, ends with the contract's code, and never with a traceback."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ccmdist.cli import exit_code
from ccmdist.diagnostics import doctor, doctor_view
from ccmdist.diagnostics.checks import gpu, ranks
from ccmdist.diagnostics.checks.finding import Finding, NoAnswerError, answer, size
from ccmdist.errors import ConfigError
from tests.unit.diagnostics.doctored import request, settings

ROOT = Path(__file__).parents[3]
CPU = {"torch": {"version": "2.13.0+cpu", "cuda": "", "devices": []}}
REPORT = {
    "host": [
        Finding("machine", "OK", "2 cores"),
        Finding("shards", "MISS", "[bold]not markup[/bold] " + "x" * 150, "a remedy"),
        Finding("umask", "WARN", "0022", "`umask 027`"),
    ]
}


class NoProbe:
    """Stands for the process that imports torch."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def facts(self):
        return CPU


@pytest.fixture
def without_torch(monkeypatch):
    monkeypatch.setattr(gpu, "TorchProbe", NoProbe)
    monkeypatch.setattr(gpu, "nvidia_driver", lambda: "")


def test_a_requirement_that_does_not_exist_is_refused_with_the_one_that_was_meant(capsys):
    assert exit_code(["doctor", "--require", "slurm,gpus"]) == 78
    assert capsys.readouterr().err == "ccmdist: --require: there is no 'gpus'; did you mean 'gpu'?\n"
    with pytest.raises(ConfigError, match="choose of gpu, slurm, flash, quant, ranks"):
        doctor.requirements("xyz")
    assert doctor.requirements(" gpu, ranks,") == {"gpu", "ranks"}


def test_settings_of_training_and_of_submission_are_understood_and_typos_refused(capsys):
    config = doctor.config([str(ROOT / "configs/train/tiny.yaml"), "slurm.signal_lead_s=240"])
    assert (config.slurm.signal_lead_s, config.num_steps) == (240, 120)
    assert doctor.config([]) is None
    assert exit_code(["doctor", str(ROOT / "configs/train/tiny.yaml"), "slurm.signal_leads=2"]) == 78
    assert "did you mean 'signal_lead_s'?" in capsys.readouterr().err


def test_a_check_that_breaks_off_is_a_finding_beside_those_it_had(without_torch, monkeypatch):
    def broken(_):
        yield Finding("first", "OK", "fine")
        raise KeyError("GraceTime\nsecond line")

    monkeypatch.setattr(doctor.slurm, "check", broken)
    report = doctor.examine(request())
    assert report["Slurm"][0].found == "fine"
    assert report["Slurm"][1].state == "WARN"
    assert report["Slurm"][1].found == "could not be checked: KeyError: 'GraceTime\\nsecond line'"
    assert report["software"] and report["host"]


def test_whatever_breaks_doctor_answers(monkeypatch, capsys):
    def broken(*_):
        raise OSError(5, "Input/output error")

    for module in (doctor.versions, doctor.host, doctor.file_system, doctor.slurm, doctor.nodes, ranks):
        monkeypatch.setattr(module, "check", broken)
    monkeypatch.setattr(gpu, "judge", broken)
    monkeypatch.setattr(gpu, "TorchProbe", NoProbe)
    assert exit_code(["doctor"]) == 0
    assert capsys.readouterr().out.count("could not be checked: OSError: [Errno 5] Input/output error") == 7


def test_what_is_required_and_missing_gives_78_and_warnings_give_0(without_torch, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert exit_code(["doctor"]) == 0
    assert "\nFIT: this machine: " in capsys.readouterr().out
    assert exit_code(["doctor", "--require", "slurm"]) == 78
    out = capsys.readouterr().out
    assert "NOT FIT: this machine with slurm: 1 MISS, " in out
    assert out.index("->  Slurm") < out.index("->  GPU")


def test_json_is_one_object_with_every_finding(without_torch, capsys, tmp_path):
    arguments = ["doctor", str(ROOT / "configs/train/tiny.yaml"), f"run={tmp_path}/run", "--require", "gpu", "--json"]
    assert exit_code([*arguments, f"data.model={tmp_path}/none"]) == 78
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert captured.err == ""
    assert (report["format"], report["verdict"], report["exit_code"], report["required"]) == (1, "MISS", 78, ["gpu"])
    rows = {(row["area"], row["what"]): row for row in report["findings"]}
    assert rows["GPU", "GPU"]["state"] == "MISS"
    assert rows["settings", "model files"]["found"] == f"{tmp_path}/none: there is no such folder"
    assert all(row["remedy"] for row in report["findings"] if row["state"] != "OK")


def test_the_report_fits_100_columns_and_shows_texts_as_they_are(capsys):
    doctor_view.show(REPORT, request("gpu", config=settings()), 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert any("[bold]not markup[/bold]" in line for line in lines)
    states = [line.split()[0] for line in lines[1:] if line.startswith("      ") and line.split()[0].isupper()]
    assert states == ["MISS", "WARN", "OK"]
    assert lines[-1].strip() == "NOT FIT: this machine with these settings, gpu: 1 MISS, 1 WARN, 1 OK, in 1.0 s"


def test_no_value_of_an_unknown_variable_is_shown(without_torch, monkeypatch, capsys):
    secret = "hunter2-never-shown"
    for name in ("WANDB_API_KEY", "HF_TOKEN", "https_proxy", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, f"http://me:{secret}@host")
    assert exit_code(["doctor"]) == 0
    assert exit_code(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert "https_proxy set" in captured.out
    assert secret not in captured.out + captured.err


def test_of_several_tasks_only_the_first_looks(monkeypatch, capsys):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert exit_code(["doctor"]) == 0
    assert capsys.readouterr().out == ""


def test_programs_that_are_absent_fail_or_hang_are_told():
    with pytest.raises(NoAnswerError, match=r"^no-such-program is not installed$"):
        answer(["no-such-program"], 1)
    with pytest.raises(NoAnswerError, match=r"^out of order$"):
        answer(["sh", "-c", "echo out of order >&2; exit 3"], 5)
    with pytest.raises(NoAnswerError, match="did not answer in 0 s"):
        answer(["sleep", "5"], 0.05)


def test_sizes_are_for_people():
    assert [size(n) for n in (0, 1023, 1536, 72 * 2**30)] == ["0 B", "0.999 KiB", "1.5 KiB", "72 GiB"]


def test_doctor_really_looks_at_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "ccmdist", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    report = json.loads(done.stdout)
    assert report["exit_code"] == done.returncode == 0, report
    rows = {row["what"]: row for row in report["findings"]}
    assert "torch 2." in rows["versions"]["found"]
    assert not [row for row in report["findings"] if "could not be checked" in row["found"]]
    assert "GPU" in rows
