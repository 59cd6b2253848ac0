"""Launchers and batch scripts ask the stages how much is left and how much is done, before anything is loaded."""

import json
import subprocess
import sys

import pytest

from ccmdist.cli import exit_code
from ccmdist.errors import EvaluationError, ModelError, ShardError

HEAVY = ("torch", "deepspeed", "diffusers", "transformers", "peft", "accelerate", "datasets")
COUNTS = f"""
import importlib, json, sys
from ccmdist.cli import STAGES
from ccmdist.config.loading import load
found = []
for stage, *arguments in json.loads(sys.argv[1]):
    config, job = load(STAGES[stage], [], arguments), importlib.import_module(f"ccmdist.jobs.{{stage}}")
    found.append(job.open_units(config))
if loaded := sys.modules.keys() & set({HEAVY!r}):
    sys.exit(f"{{loaded}} were imported")
print(json.dumps(found))
"""


def counts(*commands):
    """Open units for each list of a stage and its settings, told without torch."""
    ended = subprocess.run(
        [sys.executable, "-c", COUNTS, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Nine phantoms in six shards of two, the test split in two, and the tiny model."""
    folder = tmp_path_factory.mktemp("units")
    phantoms = ["size_px=64", "subjects_per_group=3", "frames_per_subject=1", "samples_per_shard=2"]
    fractions = ["val_fraction=0.3", "test_fraction=0.3"]
    assert exit_code(["shards", "phantom", f"out={folder}/shards", *phantoms, *fractions]) == 0
    assert exit_code(["model", "make", "--out", f"{folder}/model"]) == 0
    return folder


def test_every_stage_counts_what_is_left_at_any_time(folder):
    data = [f"data.{name}={folder}/{name}" for name in ("shards", "model", "cache")]
    data += ["data.image_size_px=64", "data.dtype=fp32"]
    precompute = ["precompute", *data, "splits=[val,test]"]
    drawn = [*data, f"out={folder}/drawn", "batch_size=2", "batches_per_shard=2"]
    synthesize = ["synthesize", *drawn, "denoise_steps=2", "guidance_scale=1", "images_per_mask=3"]
    evaluate = ["evaluate", f"out={folder}/report", f"real={folder}/shards", f"synthetic.a={folder}/drawn"]

    # Nothing yet but shards and a model: 2 + 2 shards of 3 samples; 3 x 3 images in pairs; as many shards as real ones.
    assert counts(precompute, synthesize, evaluate) == [4, 5, 4]
    # Masks of train count with their flipped views.
    assert counts([*synthesize, "split=train", "data.flips=[hflip,vflip]"]) == [14]

    assert exit_code([*precompute[:-1], "splits=[test]"]) == 0
    assert exit_code([*synthesize, f"out={folder}/other"]) == 0
    assert counts(precompute, synthesize) == [2, 5]

    # A set that is begun counts by its plan.
    (folder / "drawn").mkdir()
    (folder / "drawn" / "plan.json").write_bytes((folder / "other" / "plan.json").read_bytes())
    assert counts(synthesize, evaluate) == [5, 2 + 3]
    (folder / "drawn" / "test-000000.tar").write_bytes((folder / "other" / "test-000000.tar").read_bytes())
    assert counts(synthesize) == [3]

    # Complete: each of 2 real and 3 synthetic shards is measured, its features are read; copies are looked for in
    # 3 synthetic and all 6 real ones, and duplicates within the set.
    complete = [*evaluate[:-1], f"synthetic.a={folder}/other"]
    assert counts([*synthesize, f"out={folder}/other"], complete) == [0, 2 * (2 + 3) + (3 + 6) + 1]
    assert exit_code(complete) == 0
    assert counts(complete) == [0]


def test_what_is_not_there_cannot_be_counted(tmp_path):
    from ccmdist.cli import STAGES
    from ccmdist.config.loading import load
    from ccmdist.jobs import evaluate, precompute, synthesize

    none = [f"data.{name}={tmp_path}/none" for name in ("shards", "model")]
    sets = [f"real={tmp_path}/none", f"synthetic.a={tmp_path}"]
    wanted = {
        precompute: ("precompute", none, ModelError),
        synthesize: ("synthesize", [*none, f"out={tmp_path}/out"], ShardError),
        evaluate: (
            "evaluate",
            [*sets, f"out={tmp_path}/report"],
            EvaluationError,
        ),
    }
    for job, (stage, arguments, error) in wanted.items():
        config = load(STAGES[stage], [], arguments)
        with pytest.raises(error, match=f"{tmp_path}/none"):
            job.open_units(config)
    assert list(tmp_path.iterdir()) == []
