"""What a training run lacks is told before anything is loaded, by its dry run too."""

import subprocess
import sys

import pytest

from ccmdist.cli import exit_code

WITHOUT_LIBRARY = """
import sys
sys.modules["bitsandbytes"] = None
from ccmdist.cli import exit_code
sys.exit(exit_code(sys.argv[1:]))
"""
TOLD = 'needs bitsandbytes, which is not installed; run `pip install "ccmdist[quant]"`, or set base=int8 or bf16'


@pytest.fixture
def arguments(tmp_path):
    folders = [f"data.{name}={tmp_path / 'missing'}" for name in ("shards", "model", "cache")]
    return ["train", f"run={tmp_path / 'run'}", *folders]


@pytest.mark.parametrize(
    ("setting", "what"), [("base=nf4", "base: nf4"), ("optim.kind=adamw8bit", "optim.kind: adamw8bit")]
)
def test_a_dry_run_tells_that_a_library_is_missing(arguments, monkeypatch, capsys, setting, what):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert exit_code([*arguments, setting, "--dry-run"]) == 78
    assert f"{what} {TOLD}" in capsys.readouterr().err


def test_a_run_tells_it_before_it_looks_for_the_model(arguments):
    command = [sys.executable, "-c", WITHOUT_LIBRARY, *arguments, "base=nf4"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert f"base: nf4 {TOLD}" in ended.stderr
