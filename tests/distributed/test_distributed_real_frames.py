"""The whole chain on real frames, where a folder of them is named; none is part of the project."""

import json
import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.distributed

FRAMES = os.environ.get("CCMDIST_REAL_FRAMES", "")
SPLITS = ("train", "val", "test")
CONFIGS = Path(__file__).parents[2] / "configs"
SETTINGS = ["data.image_size_px=128", "data.dtype=fp32"]
TRAINING = ["num_steps=20", "global_batch_size=8", "micro_batch_size=4", "base=fp32", "checkpoint.every_steps=10"]


def _run(arguments):
    import sys

    import torch

    from ccmdist.cli import exit_code

    torch.set_num_threads(1)
    sys.exit(exit_code(list(arguments)))


@pytest.fixture
def ccmdist(forkserver):
    """Run one command as a process of its own, which starts with the heavy imports done; its exit code."""

    def run(*arguments):
        child = forkserver.Process(target=_run, args=(arguments,))
        child.start()
        child.join(timeout=400)
        return child.exitcode

    return run


@pytest.mark.skipif(not FRAMES, reason="CCMDIST_REAL_FRAMES names no folder with real frames")
def test_real_frames_go_through_the_whole_chain(ccmdist, tmp_path):
    data = [f"data.shards={tmp_path}/shards", f"data.model={tmp_path}/model", f"data.cache={tmp_path}/cache", *SETTINGS]
    run = tmp_path / "run"
    assert ccmdist("shards", "folders", f"source={FRAMES}", f"out={tmp_path}/shards") == 0
    assert ccmdist("shards", "verify", f"{tmp_path}/shards") == 0
    assert ccmdist("model", "make", "--size", "tiny", "--fitted", "--out", f"{tmp_path}/model") == 0
    assert ccmdist("precompute", *data) == 0
    assert ccmdist("train", str(CONFIGS / "train/tiny.yaml"), f"run={run}", *data, *TRAINING) == 0
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    num_drawn = 0
    for split in SPLITS:
        out = tmp_path / f"synthetic-{split}"
        drawn = ["synthesize", *data, f"adapter={run}/adapter", f"split={split}", f"out={out}", "denoise_steps=4"]
        assert ccmdist(*drawn) == 0
        assert ccmdist("shards", "verify", str(out), "--plan") == 0
        num_drawn += sum(shard["num_samples"] for shard in json.loads((out / "manifest.json").read_text())["shards"])
    assert num_drawn == sum(shard["num_samples"] for shard in manifest["shards"]) > 0
    report = tmp_path / "report"
    synthetic = f"synthetic.wdlora={tmp_path}/synthetic-test"
    assert ccmdist("evaluate", f"real={tmp_path}/shards", synthetic, f"out={report}") == 0
    page = (report / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 3
    values = json.loads((report / "report.json").read_text())
    assert values["synthetic"]["wdlora"]["counts"]
    # Frames without a diagnosis give no statement about a clinical group.
    assert {row["clinical_group"] for row in values["synthetic"]["wdlora"]["equivalence"]} <= {"all"}
