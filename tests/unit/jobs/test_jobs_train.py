"""What a training run lacks is told before anything is loaded, by its dry run too."""

import subprocess
import sys

import pytest

from ccmdist.cli import exit_code
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.jobs.train import _adapters
from tests.distributed.small_world import data_overrides

WITHOUT_LIBRARY = """
import sys
sys.modules["bitsandbytes"] = None
from ccmdist.cli import exit_code
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.data.phantom_shards import write_phantom_set
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


def test_a_dry_run_of_spade_tells_of_pixels_and_needs_neither_model_nor_cache(tmp_path, capsys):
    frames = {"subjects_per_group": 2, "frames_per_subject": 1, "val_fraction": 0, "test_fraction": 0}
    write_phantom_set(PhantomShardsConfig(out=tmp_path / "shards", size_px=64, **frames))
    folders = [f"data.shards={tmp_path}/shards", "data.model=nowhere", "data.cache=nowhere"]
    spade = ["objective={kind: spade, channels: [8, 8]}", "data.image_size_px=64", "global_batch_size=2"]
    assert exit_code(["train", f"run={tmp_path}/run", *folders, *spade, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "model: spade from scratch, on pixels\nsamples: 6 (Control 2, T1DPN 2, T1NoDPN 2)\nbatches: 1000" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["adapter.lora_rank=4"], "adapter wdlora of rank 4\n"),
        (
            ["adapter={kind: lora, growth: {fisher_ratio: 1.2, rank_budget: 90}}"],
            "adapter selora: ranks of 44 linears from 1 to 16, one more where the Fisher ratio reaches 1.2, tested "
            "every 40 steps, at most 90 ranks in all\n",
        ),
        (
            ["adapter={kind: wdlora, lora_rank: 8, growth: {start_rank: 2}}"],
            "adapter se-wdlora: ranks of 44 linears from 2 to 8, one more where the Fisher ratio reaches 1.3, tested "
            "every 40 steps\n",
        ),
        (
            ["objective={kind: dual, adapters: [synthesis], layout_weight: 0}", "adapter={kind: lora, lora_rank: 4}"],
            "adapter lora of rank 4 for synthesis alone\n",
        ),
    ],
)
def test_a_dry_run_tells_what_is_trained(world, tmp_path, capsys, settings, told):
    arguments = [*data_overrides(world), f"run={tmp_path}/run", "global_batch_size=4", *settings]
    assert exit_code(["train", *arguments, "--dry-run"]) == 0
    assert f"model: Qwen-Image-Edit 2509 at {world}/model, {told}" in capsys.readouterr().out


def test_a_dry_run_of_two_adapters_tells_which_step_trains_which():
    config = load(
        TrainConfig,
        [],
        ["run=r", "data.shards=s", "data.model=m", "data.holes={}", "objective={kind: dual, completion_fraction: 0.3}"],
    )
    told = "two adapters wdlora of rank 16, synthesis and completion: each step trains one, 30% of them completion"
    assert _adapters(config, 716) == told


def test_a_budget_that_does_not_suffice_is_refused_before_the_start(world, tmp_path, capsys):
    arguments = [*data_overrides(world), f"run={tmp_path}/run", "adapter={kind: lora, growth: {rank_budget: 43}}"]
    assert exit_code(["train", *arguments, "--dry-run"]) == 78
    assert "43 ranks do not suffice for 44 adapted linears of start_rank 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
