"""Benchmarks of a GPU: they run on a CPU too, never claim there what only a GPU can show, and end in time."""

import importlib
import json
import os
import time
from pathlib import Path

import pytest

from tests.unit.benchmarks.small_scripts import BENCHMARKS, SCRIPTS, run_scripts


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/, by its name there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_every_script_runs_on_a_cpu_and_its_rows_say_so_and_have_no_limit(forkserver, tmp_path):
    child = forkserver.Process(target=run_scripts, args=(str(tmp_path / "results"), str(tmp_path / "shown")))
    child.start()
    child.join(timeout=240)
    assert child.exitcode == 0, (tmp_path / "shown").read_text()
    for name in SCRIPTS:
        rows = json.loads((tmp_path / "results" / f"gpu_{name}_cpu.json").read_text())
        assert rows, name
        for row in rows:
            assert "on a CPU" in row["claim"]
            assert (row["limit"], row["goal"], row["holds"]) == (None, None, None)
            assert row["ours"] > 0


def test_only_the_whole_model_on_a_gpu_is_held_to_a_target(module):
    scale = module("measure.scale")
    whole = scale.Scale("cuda", **scale.FULL)
    assert (whole.limit(6.0), whole.anchor("published"), whole.file("training")) == (6.0, "published", "gpu_training")
    for other, name in (
        (scale.Scale("cuda", **scale.FULL | {"blocks": 2}), "gpu_training_part"),
        (scale.Scale("cpu", **scale.FULL), "gpu_training_cpu"),
    ):
        assert (other.limit(6.0), other.anchor("published"), other.file("training")) == (None, None, name)


def test_the_whole_model_has_the_parameters_that_the_planner_counts(module):
    scale = module("measure.scale")
    whole = scale.Scale("cuda", **scale.FULL)
    assert whole.transformer.num_parameters == 20_430_401_088
    assert whole.tokens.total == 1408


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce GTX 1080", None),
        ("on a CPU", None),
    ],
)
def test_a_gpu_is_found_in_the_planner_by_its_name(module, name, key):
    assert module("measure.scale").gpu_key(name) == key


SCRIPT = """
import json, os, sys
sys.path.insert(0, {benchmarks!r})
from measure.cases import serve

def measure(case):
    yield case | {{"value": 2 * case["number"]}}
    if case["number"] == 1:
        print("no result", flush=True)
        os._exit(9)

sys.exit(serve(sys.argv[2], measure))
"""


def test_a_case_that_dies_leaves_what_it_had_measured_and_the_others_go_on(module, tmp_path, capfd):
    script = tmp_path / "one.py"
    script.write_text(SCRIPT.format(benchmarks=str(BENCHMARKS)))
    cases = [{"number": 1}, {"number": 2}]
    found = list(module("measure.cases").results(str(script), cases, None, is_apart=True))
    assert found == [
        {"number": 1, "value": 2},
        {"number": 1, "died": True, "problem": "the process ended with 9"},
        {"number": 2, "value": 4},
    ]
    assert "no result" in capfd.readouterr().err


def test_a_script_that_takes_too_long_is_ended_with_its_children(module, monkeypatch, tmp_path):
    run_all = module("run_all")
    children = tmp_path / "child"
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys, time, pathlib\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(children)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(run_all, "__file__", str(tmp_path / "run_all.py"))
    assert run_all.run("slow", [], limit_s=2.0).startswith("stopped after 2 s")
    process = int(children.read_text())
    for _ in range(100):
        if not _is_alive(process):
            return
        time.sleep(0.05)
    pytest.fail("its child goes on")


def _is_alive(process):
    try:
        os.kill(process, 0)
        return "Z" not in Path(f"/proc/{process}/stat").read_text().split(") ")[1][:1]
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_script_of_which_a_process_died_fails_even_without_a_target(module, monkeypatch, tmp_path):
    training, scale = module("training"), module("measure.scale")
    monkeypatch.setattr(module("measure.rows"), "RESULTS", tmp_path)
    monkeypatch.setattr(scale.torch.cuda, "is_available", lambda: True)
    died = {"recompute": "none", "died": True, "problem": "gone"}
    monkeypatch.setattr(module("measure.cases"), "results", lambda *_, **__: [died])
    monkeypatch.setattr("sys.argv", [str(BENCHMARKS / "gpu" / "training.py")])
    assert training.main() == 1
    (row,) = json.loads((tmp_path / "gpu_training.json").read_text())
    assert (row["ours"], row["claim"].endswith(": gone")) == (0.0, True)
