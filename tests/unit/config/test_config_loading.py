"""Settings are merged, validated once, and every problem is named with its remedy."""

import re
from pathlib import Path

import pytest

from ccmdist.config.loading import differences, digest, load, resolved, validate
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError

REQUIRED = ["run=runs/a", "data.shards=shards/a", "data.model=models/a"]


def test_later_files_and_overrides_win(tmp_path):
    (tmp_path / "a.yaml").write_text("num_steps: 5\nseed: 1\noptim:\n  lr: 1e-4\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = load(TrainConfig, [tmp_path / "a.yaml", tmp_path / "b.yaml"], [*REQUIRED, "num_steps=7"])
    assert (config.num_steps, config.seed, config.optim.lr) == (7, 2, 1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.warmup_step=5"], "optim.warmup_step: no such field; did you mean 'warmup_steps'?"),
        (
            ["adapter.kind=wdlora", "adapter.lora_rnk=8"],
            "adapter.lora_rnk: no such field; did you mean 'lora_rank'?",
        ),
        (["adapter.kind=dora"], "adapter.kind: must be one of 'wdlora', 'lora' (got 'dora')"),
        (
            ["adapter.kind=lora", "adapter.growth.fisher_ratio=0.9"],
            "  adapter.growth.fisher_ratio: should be greater than 1 (got 0.9)",
        ),
        (["data.holes=4"], "data.holes: should be a section of fields (got 4)"),
        (["data.holes.shapes=band"], "data.holes.shapes: should be a list, such as [a,b] (got 'band')"),
        (["data.holes.shapes=[]"], "data.holes.shapes: should have more items (got [])"),
        (["optim.lr=fast"], "optim.lr: should be a valid number, unable to parse string as a number (got 'fast')"),
        (["optim.lr=0"], "optim.lr: should be greater than 0 (got 0)"),
        (["micro_batch_size=7"], "global_batch_size 16 must be a multiple of micro_batch_size 7"),
        (["validation.sigmas=[0.5,1.0]"], "validation.sigmas [0.5, 1.0] must lie between 0 and 1"),
        (["data.image_size_px=100"], "data.image_size_px: should be a multiple of 16 (got 100)"),
        (
            ["run=${oc.env:HOME}"],
            "run: interpolation '${oc.env:HOME}' is not allowed in a config; write the value itself",
        ),
        (["run=${seed}"], "run: interpolation '${seed}' is not allowed in a config"),
        (["num_steps"], "'num_steps' is neither a YAML file nor an override; write overrides as key=value"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(TrainConfig, [], [*REQUIRED, *overrides])


def test_an_adapter_without_a_kind_is_wdlora():
    config = load(TrainConfig, [], [*REQUIRED, "adapter.lora_rank=4"])
    assert (config.adapter.kind, config.adapter.lora_rank) == ("wdlora", 4)


def test_all_problems_are_told_at_once():
    with pytest.raises(ConfigError) as problem:
        load(TrainConfig, [], ["num_step=1", "optim.lr=2"])
    assert all(text in str(problem.value) for text in ("run: is required", "num_step:", "optim.lr:"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: !!python/object/apply:os.system ['true']\n", "could not determine a constructor for the tag"),
        ("seed: 1\nseed: 2\n", "found duplicate key seed"),
        ("- 1\n", "holds a list, expected a mapping of fields"),
        ("a: [1\n", "use plain YAML"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused_by_name(tmp_path, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as problem:
        load(TrainConfig, [tmp_path / "bad.yaml"])
    assert "bad.yaml" in str(problem.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no/such\.yaml: No such file or directory"):
        load(TrainConfig, [Path("no/such.yaml")])


def test_the_digest_ignores_free_fields_and_notices_all_others():
    base = load(TrainConfig, [], REQUIRED)
    assert digest(base) == digest(load(TrainConfig, [], [*REQUIRED, "processes=4", "checkpoint.every_steps=7"]))
    assert digest(base) != digest(load(TrainConfig, [], [*REQUIRED, "optim.lr=2e-4"]))


def test_differences_name_the_old_and_the_new_value():
    before, now = (load(TrainConfig, [], [*REQUIRED, f"seed={seed}", f"processes={seed + 1}"]) for seed in (0, 1))
    assert differences(resolved(before), resolved(now), TrainConfig) == {"seed": "0 -> 1"}


def test_resolved_settings_validate_to_the_same_settings():
    config = load(TrainConfig, [], [*REQUIRED, "adapter.kind=lora", "adapter.lora_rank=4"])
    assert validate(TrainConfig, resolved(config), "test") == config


def test_every_shipped_config_loads():
    from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
    from ccmdist.config.evaluate import EvaluateConfig
    from ccmdist.config.select import SelectConfig
    from ccmdist.config.synthesize import SynthesizeConfig

    kinds = {
        "shards": PhantomShardsConfig,
        "precompute": PrecomputeConfig,
        "train": TrainConfig,
        "synthesize": SynthesizeConfig,
        "evaluate": EvaluateConfig,
        "select": SelectConfig,
    }
    root = Path(__file__).parents[3]
    files = sorted((root / "configs").rglob("*.yaml"))
    assert files
    for file in files:
        first_line = file.read_text().splitlines()[0]
        assert first_line.startswith(f"# ccmdist {file.parent.name} "), (
            f"{file} does not begin with the command that uses it"
        )
        words = first_line.split()[3:]
        assert str(file.relative_to(root)) in words
        load(
            kinds[file.parent.name],
            [root / word for word in words if "=" not in word],
            [w for w in words if "=" in w],
        )
