"""Settings of ranks that grow: what is refused, what they mean, and that they leave older settings as they were."""

from pathlib import Path

import pytest

from ccmdist.config.loading import digest, load, resolved
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError

REQUIRED = ["run=runs/x", "data.shards=shards/x", "data.model=models/x"]
CONFIGS = Path(__file__).parents[3] / "configs" / "train"


def loaded(*overrides, files=()):
    return load(TrainConfig, [CONFIGS / f"{name}.yaml" for name in files], [*REQUIRED, *overrides])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["adapter.growth.fisher_ratio=1"], r"adapter\.growth\.fisher_ratio: .*greater than 1"),
        (["adapter.growth.fisher_ratio=0.9"], "greater than 1"),
        (["adapter.growth.every_steps=0"], "greater than or equal to 1"),
        (["adapter.lora_rank=4", "adapter.growth.start_rank=4"], "start_rank 4 must be below lora_rank 4"),
        (["adapter.growth={}", "optim.kind=adamw8bit"], "which optim.kind adamw8bit cannot; set adamw"),
        (
            ["adapter.growth={}", "objective.kind=dual", "objective.adapters=[synthesis]"],
            "ranks of objective.kind dual do not grow; leave out, or train edit",
        ),
    ],
)
def test_what_cannot_grow_is_refused(overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        loaded(*overrides)


def test_both_systems_start_at_rank_one_with_the_authors_threshold_interval_and_scale():
    for more, kind in ([], "lora"), (["se_wdlora"], "wdlora"):
        adapter = loaded(files=["wdlora", "selora", *more]).adapter
        assert (adapter.kind, adapter.scale, adapter.lora_rank) == (kind, 8.0, 32)
        growth = adapter.growth
        assert (growth.start_rank, growth.fisher_ratio, growth.every_steps, growth.rank_budget) == (1, 1.3, 40, None)


def test_settings_without_growth_are_written_as_before_there_was_any():
    assert "growth" not in resolved(loaded())["adapter"]
    assert digest(loaded()) == digest(loaded("adapter.growth=null"))
    assert digest(loaded()) != digest(loaded("adapter.growth={}"))
