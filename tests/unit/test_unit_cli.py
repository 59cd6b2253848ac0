"""The command line answers at once, says what is wrong and how to mend it, and ends with the contract's exit codes."""

import importlib
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from ccmdist import cli
from ccmdist.cli import app, exit_code
from ccmdist.errors import CcmdistError, ConfigError, ModelError, Preempted

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "deepspeed", "diffusers", "transformers", "peft", "accelerate", "datasets")
WITHOUT_TORCH = f"""
import sys
class Refusing:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {HEAVY!r}:
            raise ImportError(name)
sys.meta_path.insert(0, Refusing())
from ccmdist.cli import exit_code
sys.exit(exit_code(sys.argv[1:]))
"""


def commands(group=None, words=()):
    """Words of every command and group of commands."""
    group = group or typer.main.get_command(app)
    found = [words]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*words, name)) if hasattr(command, "commands") else [(*words, name)]
    return found


def helped(capsys, words):
    assert exit_code([*words, "--help"]) == 0
    return capsys.readouterr().out


def said(capsys, arguments, code):
    assert exit_code(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def without_torch(*arguments, cwd=ROOT):
    """A process in which every heavy import fails."""
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


class Job:
    """Stands for every module of ccmdist.jobs; notes what is called in it."""

    def __init__(self, monkeypatch, result=0):
        self.calls, self.result = [], result
        original = importlib.import_module

        def module(name):
            if not name.startswith(("ccmdist.jobs.", "ccmdist.diagnostics.")):
                return original(name)
            self.module = name
            return self

        monkeypatch.setattr(cli.importlib, "import_module", module)

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((self.module, name, arguments))
            if isinstance(self.result, BaseException):
                raise self.result
            return self.result

        return call


ALL = commands()


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_every_help_ends_with_an_example_that_can_be_run(words, capsys, monkeypatch):
    last = helped(capsys, words).rstrip().splitlines()[-1].strip()
    program, *example = shlex.split(last.removeprefix("Example: "))
    assert program == "ccmdist", last
    assert tuple(example[: len(words)]) == words
    monkeypatch.chdir(ROOT)
    job = Job(monkeypatch)
    assert exit_code(example) == 0, capsys.readouterr().err
    assert len(job.calls) == 1


@pytest.mark.parametrize("words", ALL, ids=" ".join)
def test_what_a_command_calls_exists_and_takes_what_it_is_given(words, capsys, monkeypatch):
    example = helped(capsys, words).rstrip().splitlines()[-1].strip().removeprefix("Example: ccmdist ")
    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        job = Job(patch)
        exit_code(shlex.split(example))
    for module, function, arguments in job.calls:
        inspect.signature(getattr(importlib.import_module(module), function)).bind(*arguments)


def test_every_command_says_in_its_help_what_it_does(capsys):
    for words in ALL:
        text = helped(capsys, words)
        assert re.match(rf"Usage: {' '.join(('ccmdist', *words))} .*\n\n  [A-Z]", text), text


def test_help_and_errors_need_no_torch():
    program = WITHOUT_TORCH.replace(
        "sys.exit(exit_code(sys.argv[1:]))",
        f"codes = [exit_code([*words, '--help']) for words in {ALL!r}]\n"
        "codes += [exit_code(['trian']), exit_code(['train', 'no.yaml'])]\nprint(codes)",
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == str([0] * len(ALL) + [78, 78])


def test_importing_the_command_line_imports_nothing_heavy():
    program = "import sys, ccmdist.cli; print([n for n in sys.argv[1:] if n in sys.modules])"
    names = [*HEAVY, "scipy", "pandas", "matplotlib", "skimage", "numba"]
    ended = subprocess.run([sys.executable, "-c", program, *names], capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? (see `ccmdist --help`)"),
        (["shards", "phantoms"], "No such command 'phantoms'. Did you mean 'phantom'? (see `ccmdist shards --help`)"),
        (["train", "--dryrun"], "--dry-run"),
        (["model", "make", "--siz", "tiny"], "No such option: --siz (Possible options: --size)"),
        (["model", "make"], "Missing option '--out'. (see `ccmdist model make --help`)"),
        (["model", "make", "--out", "a", "--seed", "two"], "Invalid value for '--seed'"),
        (["adapter", "show"], "Missing argument 'source'"),
        (["demo", "surplus"], "surplus"),
    ],
)
def test_a_wrong_command_or_option_is_refused_with_what_was_meant(capsys, arguments, message):
    text = said(capsys, arguments, 78)
    assert text.startswith("ccmdist: ")
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize("words", [(), ("shards",), ("model",), ("adapter",)])
def test_a_group_without_a_command_tells_its_commands(capsys, words):
    text = said(capsys, list(words), 78)
    assert "Commands:" in text
    assert "Example: ccmdist " in text


STAGES = [["shards", "phantom"], ["shards", "folders"]]
STAGES += [["precompute"], ["train"], ["synthesize"], ["evaluate"], ["select"]]


@pytest.mark.parametrize("stage", STAGES, ids=" ".join)
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("no/such.yaml", "no/such.yaml: No such file or directory; name an existing YAML file"),
        ("seeed=1", "seeed: no such field; "),
        ("--dry", "No such option: --dry"),
        ("a=[", "override 'a=['"),
        ("word", "word: No such file or directory; name an existing YAML file, or write overrides as key=value"),
    ],
)
def test_every_stage_refuses_wrong_settings_by_name(capsys, monkeypatch, stage, argument, message):
    job = Job(monkeypatch)
    text = said(capsys, [*stage, argument], 78)
    assert message in text
    assert "Traceback" not in text
    assert job.calls == []


def test_all_problems_of_the_settings_are_told_in_one_message(capsys):
    text = said(capsys, ["train", "num_step=1", "optim.lr=2"], 78)
    assert "TrainConfig from the command line:" in text
    assert "num_step: no such field; did you mean 'num_steps'?" in text
    assert "optim.lr: " in text
    assert "run: is required" in text


PHANTOM = ["shards", "phantom", "out=shards/x"]


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a: wrong", "mend it"), 78, "ccmdist: a: wrong; mend it\n"),
        (ModelError("m: half", "get it"), 78, "ccmdist: m: half; get it\n"),
        (CcmdistError("x"), 78, "ccmdist: x\n"),
        (Preempted("stopped at 3 of 9"), 75, "ccmdist: stopped at 3 of 9\n"),
        (KeyboardInterrupt(), 75, "ccmdist: stopped by ctrl-C; run the same command again to go on\n"),
        (
            PermissionError(13, "Permission denied", "/data/x"),
            78,
            "ccmdist: /data/x: Permission denied; see that the path exists, can be written and has space left\n",
        ),
        (
            OSError(28, "No space left on device"),
            78,
            "ccmdist: No space left on device; see that the path exists, can be written and has space left\n",
        ),
    ],
)
def test_what_a_user_can_mend_is_one_message_without_a_traceback(capsys, monkeypatch, error, code, text):
    Job(monkeypatch, result=error)
    assert said(capsys, PHANTOM, code).lstrip("\n") == text


def test_a_file_system_that_fails_is_not_the_users_fault_so_that_a_job_comes_back(capsys, monkeypatch):
    Job(monkeypatch, result=OSError(116, "Stale file handle", "/data/x"))
    text = said(capsys, PHANTOM, 70)
    assert text.startswith("ccmdist: /data/x: Stale file handle; the file system failed on ")
    assert text.endswith("; run the same command again, or elsewhere\n")


@pytest.mark.parametrize("error", [ValueError("odd"), OSError("odd"), AssertionError("odd"), RuntimeError("odd")])
def test_an_error_of_ours_keeps_its_traceback(capsys, monkeypatch, error):
    Job(monkeypatch, result=error)
    text = said(capsys, PHANTOM, 70)
    assert "Traceback (most recent call last)" in text
    assert f"{type(error).__name__}: odd" in text
    assert text.endswith("this is an error of ours, not of your input; please report it with the lines above\n")


@pytest.mark.parametrize("code", [0, 70, 75, 78])
def test_training_ends_with_the_exit_code_of_its_run(monkeypatch, code):
    job = Job(monkeypatch, result=code)
    arguments = [
        "train",
        "run=r",
        "data.shards=s",
        "data.model=m",
        "--allow-change",
        "num_steps",
        "--allow-change",
        "seed",
    ]
    assert exit_code(arguments) == code
    assert job.calls[0][2][1] == {"num_steps", "seed"}


def test_the_job_of_a_stage_reads_the_settings_that_were_resolved(monkeypatch):
    from ccmdist.config.data import PhantomShardsConfig
    from ccmdist.config.loading import read_resolved

    seen = []
    Job(monkeypatch)
    monkeypatch.setattr(Job, "phantom", lambda self, p: seen.append(read_resolved(PhantomShardsConfig, Path(p))), False)
    assert exit_code([*PHANTOM, "size_px=64"]) == 0
    assert (seen[0].out, seen[0].size_px, seen[0].samples_per_shard) == (Path("shards/x"), 64, 256)


def test_the_process_ends_with_the_exit_code():
    command = [sys.executable, "-m", "ccmdist", "train", "no.yaml"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 78
    assert ended.stderr.startswith("ccmdist: no.yaml: No such file or directory; ")
    assert ended.stderr.count("\n") == 1


def test_ctrl_c_in_a_working_process_asks_to_run_the_command_again(tmp_path):
    overrides = [f"out={tmp_path}/shards", "subjects_per_group=5000", "size_px=64"]
    command = [sys.executable, "-m", "ccmdist", "shards", "phantom", *overrides]
    # A shell that starts the tests in the background lets them, and what they start, ignore ctrl-C.
    heeds = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **heeds)
    while not (tmp_path / "shards").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert "stopped by ctrl-C; run the same command again to go on" in process.communicate(timeout=60)[1]
    assert process.returncode == 75


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A folder where phantoms, the tiny model and its cache are made; the arguments of each later stage."""
    folder = tmp_path_factory.mktemp("chain")
    data = [f"data.shards={folder}/shards", f"data.model={folder}/model", f"data.cache={folder}/cache"]
    data += ["data.image_size_px=64", "data.dtype=fp32"]
    phantoms = [f"out={folder}/shards", "size_px=64", "subjects_per_group=3", "val_fraction=0.3", "test_fraction=0.3"]
    assert exit_code(["shards", "phantom", *phantoms]) == 0
    assert exit_code(["model", "make", "--out", f"{folder}/model"]) == 0
    assert exit_code(["precompute", *data]) == 0
    drawn = [*data, f"out={folder}/drawn", "denoise_steps=2", "guidance_scale=1"]
    assert exit_code(["synthesize", *drawn]) == 0
    return folder, {
        "shards phantom": [f"out={folder}/more", "size_px=64"],
        "precompute": [*data, "data.flips=[hflip]"],
        "train": [*data, f"run={folder}/run", "num_steps=5", "global_batch_size=4"],
        "synthesize": [*data, f"out={folder}/synthetic", "images_per_mask=2"],
        "evaluate": [f"out={folder}/report", f"real={folder}/shards", f"synthetic.tiny={folder}/drawn"],
    }


PLANS = {
    "shards phantom": "phantoms of 64 px",
    "precompute": "0 of ",
    "train": "5 steps of 4 samples",
    "synthesize": "0 batches are committed",
    "evaluate": "tiny: ",
}


@pytest.mark.parametrize("stage", PLANS)
def test_a_dry_run_shows_the_settings_and_the_plan_and_does_nothing(chain, stage):
    folder, arguments = chain
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    ended = without_torch(*stage.split(), *arguments[stage], "--dry-run", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    settings, end = json.JSONDecoder().raw_decode(ended.stdout)
    assert settings
    digest, *plan, last = ended.stdout[end:].strip().splitlines()
    assert re.fullmatch(r"digest [0-9a-f]{64}", digest)
    assert plan
    assert PLANS[stage] in "\n".join(plan)
    assert last == "dry run: nothing was done"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("stage", ["precompute", "train", "synthesize", "evaluate"])
def test_a_dry_run_of_what_could_not_start_is_refused_without_torch(tmp_path, stage):
    missing = ["data.shards=none", "data.model=none"]
    arguments = {
        "precompute": missing,
        "train": [*missing, "run=run"],
        "synthesize": [*missing, "out=out"],
        "evaluate": ["real=none", "synthetic.a=none", "out=out"],
    }[stage]
    ended = without_torch(stage, *arguments, "--dry-run", cwd=tmp_path)
    assert ended.returncode == 78, ended.stderr
    assert re.search(r"^ccmdist: (real: )?none\b.*; ", ended.stderr, re.MULTILINE)
    assert "dry run" not in ended.stdout
    assert list(tmp_path.iterdir()) == []
