"""One command line holds the settings of a whole chain, and what would not fit together is refused before it runs."""

import importlib
import re
from pathlib import Path

import pytest

from ccmdist.errors import ConfigError
from ccmdist.jobs.pipeline import pipeline_jobs

CHAIN = [
    "precompute=p.yaml",
    "train=t.yaml",
    "synthesize=s.yaml",
    "evaluate=e.yaml",
    "data.shards=shards/a",
    "data.model=models/a",
]


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Configs of a chain that fits together, in the working folder; nothing of it is done yet."""
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text("batch_size: 4\n")
    Path("t.yaml").write_text("run: runs/a\nslurm:\n  nodes: 2\n")
    Path("s.yaml").write_text("out: synthetic/a\n")
    Path("e.yaml").write_text("out: reports/a\nreal: shards/a\nsynthetic: {a: synthetic/a}\n")
    for stage, number in (("precompute", 3), ("synthesize", 40), ("evaluate", 5)):
        monkeypatch.setattr(importlib.import_module(f"ccmdist.jobs.{stage}"), "open_units", lambda config, n=number: n)


def test_a_chain_is_all_jobs_in_order_each_with_its_own_settings(chain):
    words = [*CHAIN, "slurm.partition=gpu", "synthesize.slurm.partition=long", "synthesize.slurm.gpus_per_node=4"]
    jobs = pipeline_jobs([*words, "train.num_steps=7"])
    assert [job.stage for job in jobs] == ["precompute", "train", "synthesize", "evaluate", "evaluate"]
    assert [job.num_array_tasks for job in jobs] == [3, 1, 10, 5, 1]
    assert [job.slurm.partition for job in jobs] == ["gpu", "gpu", "long", "gpu", "gpu"]
    assert [job.slurm.nodes for job in jobs] == [1, 2, 1, 1, 1]
    assert jobs[1].config.num_steps == 7
    assert jobs[0].config.batch_size == 4
    assert {str(job.config.data.shards) for job in jobs[:3]} == {"shards/a"}


def test_images_are_drawn_with_the_adapter_that_is_trained_before_unless_another_is_named(chain):
    assert pipeline_jobs(CHAIN)[2].config.adapter == Path("runs/a/adapter")
    assert pipeline_jobs([*CHAIN, "synthesize.adapter=mine"])[2].config.adapter == Path("mine")


def test_images_are_drawn_with_the_network_that_is_trained_before_unless_another_is_named(chain):
    words = [*CHAIN, "train.objective.kind=maisi"]
    found = pipeline_jobs(words)[2].config
    assert (found.network, found.adapter) == (Path("runs/a/network"), None)
    assert pipeline_jobs([*words, "synthesize.network=mine"])[2].config.network == Path("mine")
    with pytest.raises(ConfigError, match="base: network draws without a base model"):
        pipeline_jobs([*words, "synthesize.base=nf4"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("num_steps=5", "'num_steps=5' belongs to no stage; write STAGE=FILE.yaml, STAGE.key=value, slurm.key=value"),
        ("t.yaml", "'t.yaml' belongs to no stage; write STAGE=FILE.yaml"),
        ("slurm=5", "'slurm=5' belongs to no stage"),
        ("train", "'train' belongs to no stage"),
        ("train=nowhere.yaml", "nowhere.yaml: No such file or directory"),
        ("train.num_step=5", "num_step: no such field; did you mean 'num_steps'?"),
        (
            "train.data.image_size_px=64",
            "train.data.image_size_px is 64, but precompute fills the cache for 384; "
            "give both the same, for instance with data.image_size_px=...",
        ),
        (
            "synthesize.out=synthetic/b",
            "evaluate.synthetic names synthetic/a, but not synthetic/b, which synthesize draws; "
            "set evaluate.synthetic.NAME=synthetic/b",
        ),
        (
            "evaluate.real=shards/b",
            "evaluate.real is shards/b, but the images are drawn for masks of shards/a; set evaluate.real=shards/a",
        ),
    ],
)
def test_a_chain_with_a_gap_is_refused_with_its_remedy(chain, word, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        pipeline_jobs([*CHAIN, word])
