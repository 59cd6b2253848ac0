"""Whatever stands in a config or a path, a batch file asks Slurm for what it asks, and runs what it runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ccmdist.cluster.job_folder import JobFolder
from ccmdist.cluster.submit import BatchJob, batch_text
from ccmdist.config.slurm import SlurmSettings
from ccmdist.errors import ConfigError

TEXT_FIELDS = {
    "job_name": "job-name",
    "gpu_type": "gpus-per-node",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "reservation": "reservation",
    "constraint": "constraint",
    "exclude": "exclude",
    "comment": "comment",
}
PIECES = [
    "a",
    "é",
    " ",
    "-",
    "'",
    '"',
    "\\",
    "$(touch MARKER)",
    "`touch MARKER`",
    "; touch MARKER;",
    "&",
    "|",
    "#",
    "\n",
    "\r",
    "\x00",
    "\x85",
    "\u2028",
    "\n#SBATCH --uid=0\n",
    "%j",
    "${HOME}",
    "*",
    "~",
    "!",
    "}",
]
HOSTILE = st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=6).map("".join)
# Stands for job.sh and for Slurm: everything that the file calls, noting how it was called.
STUBS = """
told() { printf '%s\\n' "$#" "$@" >>told; printf 'end\\n' >>told; }
source() { told source "$@"; }
begin_frozen_job() { told begin "$@"; CCMDIST_PREFIX=(); }
srun() { told srun "$@"; }
conclude() { told conclude "$@"; }
"""


def text_of(folder="/j", after=(), num_array_tasks=1, **slurm):
    return batch_text(BatchJob("train", JobFolder(Path(folder)), SlurmSettings(**slurm), num_array_tasks, True, after))


def asked(text):
    """The #SBATCH lines as Slurm reads them: one option each, with its value."""
    lines = [line for line in text.split("\n") if line.startswith("#SBATCH")]
    words = [shlex.split(line.removeprefix("#SBATCH ")) for line in lines]
    assert all(len(one) == 1 for one in words), lines
    found = [one[0].removeprefix("--").partition("=")[::2] for one in words]
    assert len(dict(found)) == len(found), lines
    return dict(found)


def rest(text):
    return [line for line in text.split("\n") if not line.startswith("#SBATCH")]


@settings(max_examples=400)
@given(field=st.sampled_from(sorted(TEXT_FIELDS)), value=HOSTILE)
def test_a_setting_is_refused_or_changes_its_own_line_alone(field, value):
    try:
        slurm = SlurmSettings(**{field: value})
    except ValidationError:
        return
    text, plain = text_of(**{field: value}), text_of()
    assert "\n".join(text.splitlines()) == text.rstrip("\n"), "something else than a newline ends a line"
    assert rest(text) == rest(plain)
    expected = asked(plain)
    if value:
        expected[TEXT_FIELDS[field]] = f"{value}:{slurm.num_gpus_per_node}" if field == "gpu_type" else value
    assert asked(text) == expected


@settings(max_examples=150)
@given(name=HOSTILE)
def test_a_folder_is_refused_or_reaches_every_command_as_it_is(name, tmp_path_factory):
    here = tmp_path_factory.mktemp("here")
    folder = "/j/" + name
    try:
        text = text_of(folder)
    except ConfigError:
        return
    folder = str(Path(folder))
    assert asked(text)["output"] == f"{folder}/submitit/%j_0_log.out"
    (here / "file.sh").write_text(STUBS + text)
    checked = subprocess.run(["bash", "-n", "file.sh"], cwd=here, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    done = subprocess.run(["bash", "-u", "file.sh"], cwd=here, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(path.name for path in here.iterdir()) == ["file.sh", "told"], "something was executed"
    calls = [call.splitlines()[1:] for call in re.split(r"^end\n", (here / "told").read_text(), flags=re.MULTILINE)]
    log = f"{folder}/submitit/%j_%t_log.out"
    assert calls[0] == ["source", f"{folder}/code/slurm/job.sh"]
    assert calls[1] == ["begin", "train", folder]
    assert calls[2][:4] == ["srun", "--unbuffered", "--output", log]
    assert calls[2][-5:] == ["python3", "-u", "-m", "submitit.core._submit", f"{folder}/submitit"]
    assert calls[3] == ["conclude", "0"]


@pytest.mark.parametrize("prefix", ["/mine/a b", "/mine/it's", "/mine/$(touch MARKER)", "/mine/a}b"])
def test_an_environment_in_any_folder_is_named_as_it_is(tmp_path, monkeypatch, prefix):
    monkeypatch.setattr(sys, "prefix", prefix)
    monkeypatch.delenv("CCMDIST_VENV", raising=False)
    (tmp_path / "file.sh").write_text(STUBS + text_of() + '\nprintf %s "$CCMDIST_VENV" >venv\n')
    subprocess.run(["bash", "-u", "file.sh"], cwd=tmp_path, check=True)
    assert (tmp_path / "venv").read_text() == prefix
    environment = os.environ | {"CCMDIST_VENV": "/mine"}
    subprocess.run(["bash", "-u", "file.sh"], cwd=tmp_path, check=True, env=environment)
    assert (tmp_path / "venv").read_text() == "/mine"
    assert not (tmp_path / "MARKER").exists()
