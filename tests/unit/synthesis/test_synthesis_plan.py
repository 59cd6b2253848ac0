"""What a plan asks for, what its digest covers, and in which folders it may be carried out."""

import json
import logging
import shutil
from collections import Counter
from dataclasses import fields, replace

import pytest

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.config.data import HoleSettings
from ccmdist.console import log
from ccmdist.data.cache_index import CacheEntry, Member
from ccmdist.data.manifest import MANIFEST
from ccmdist.errors import CacheError, ConfigError, RunError, ShardError
from ccmdist.synthesis.plan import PLAN, Plan, PlanSettings, accept_plan, read_plan
from ccmdist.synthesis.requests import Batch, Request, batches_of


def test_every_image_is_asked_for_once_in_batches_of_one_text_length(config, plan_of):
    plan = plan_of(config())
    requests = [request for batch in plan.batches for request in batch.requests]
    assert sorted(request.key for request in requests) == [f"k{k}-{n:04d}" for k in range(5) for n in range(2)]
    assert [batch.num_text_tokens for batch in plan.batches] == [9, 12, 12, 12, 12]
    assert [[request.source_key for request in batch.requests] for batch in plan.batches][:2] == [
        ["k2"] * 2,
        ["k0"] * 2,
    ]
    assert plan.num_images == 10
    assert [list(plan.batches_of_shard(shard)) for shard in range(plan.num_shards)] == [[0, 1], [2, 3], [4]]


def test_a_remainder_of_a_text_length_makes_a_smaller_batch(config, plan_of):
    plan = plan_of(config("batch_size=5"))
    assert [len(batch.requests) for batch in plan.batches] == [2, 5, 3]


def test_requests_carry_subject_and_group(config, plan_of):
    requests = [request for batch in plan_of(config("images_per_mask=1")).batches for request in batch.requests]
    assert sorted(request.subject for request in requests) == [f"s{k}" for k in range(5)]
    groups = Counter(request.clinical_group or UNLABELLED for request in requests)
    assert groups == {"Control": 2, "T1NoDPN": 1, "T1DPN": 1, UNLABELLED: 1}


@pytest.mark.parametrize("name", [field.name for field in fields(PlanSettings)])
def test_the_digest_covers_every_setting(name, config, plan_of):
    plan = plan_of(config())
    before = getattr(plan.settings, name) or ""
    known = {"split": "val", "dtype": "bf16", "base": "nf4", "seed": 1, "holes": HoleSettings()}
    other = known.get(name, f"{before}x" if isinstance(before, str) else before + 1)
    changed = Plan(settings=replace(plan.settings, **{name: other}), batches=plan.batches)
    assert changed.digest != plan.digest


def test_the_digest_covers_the_requests(config, plan_of):
    plan = plan_of(config())
    first, *others = plan.batches
    assert Plan(settings=plan.settings, batches=tuple(others)).digest != plan.digest
    request = replace(first.requests[0], image_number=7)
    other = replace(first, requests=(request, *first.requests[1:]))
    assert Plan(settings=plan.settings, batches=(other, *others)).digest != plan.digest


def test_a_plan_of_whole_images_has_the_digest_that_it_had_before_there_were_holes():
    settings = PlanSettings(
        source_set_digest="a" * 64,
        cache_digest="b" * 64,
        base_digest="c" * 64,
        adapter_digest="untuned",
        noise_schedule_digest="d" * 64,
        base="fp32",
        split="test",
        image_size_px=64,
        dtype="fp32",
        images_per_mask=2,
        batch_size=2,
        batches_per_shard=2,
        denoise_steps=2,
        guidance_scale=3.0,
        seed=0,
        compile_blocks=False,
    )
    first = Batch(9, tuple(Request(f"k0-{number:04d}", "k0", number, "s0", "Control") for number in range(2)))
    plan = Plan(settings=settings, batches=(first, Batch(12, (Request("k1-0000", "k1", 0, "s1", None),))))
    assert plan.digest == "31f3901e6eaa7ebd0563a59c9cb991a767358768093e6ae7844eda2ff872503f"
    assert not {"hole", "objective", "structure"} & set(plan.provenance(0, first.requests[0], "e" * 64))


CHANGES = [
    "denoise_steps=3",
    "guidance_scale=2",
    "seed=1",
    "batch_size=3",
    "images_per_mask=1",
    "batches_per_shard=1",
    "split=train",
    "compile_blocks=true",
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_config_makes_another_plan(change, config, plan_of):
    assert plan_of(config(change)).digest != plan_of(config()).digest


def test_another_adapter_base_or_noise_schedule_makes_another_plan(sources, config, plan_of, tmp_path):
    plan = plan_of(config())
    assert plan_of(config(), "a" * 64).digest != plan.digest
    model = tmp_path / "model"
    shutil.copytree(sources / "model", model)
    same = config(f"data.model={model}")
    assert plan_of(same).digest == plan.digest, "a copy elsewhere is the same model"
    schedule = model / "scheduler" / "scheduler_config.json"
    values = json.loads(schedule.read_text())
    schedule.write_text(json.dumps(values | {"shift_terminal": 0.1}))
    assert plan_of(same).settings == replace(
        plan.settings, noise_schedule_digest=plan_of(same).settings.noise_schedule_digest
    )
    assert plan_of(same).digest != plan.digest
    schedule.write_text(json.dumps(values))
    weights = next((model / "transformer").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert plan_of(same).settings.base_digest != plan.settings.base_digest


def test_what_decides_no_bytes_is_not_in_the_digest(config, plan_of):
    assert plan_of(config("log_every_batches=9", out="elsewhere")).digest == plan_of(config()).digest


def test_one_denoise_step_is_refused(config):
    with pytest.raises(ConfigError, match=r"denoise_steps: 1, but a frozen model draws in two or more"):
        config("denoise_steps=1")


def test_a_plan_is_read_back_as_it_was_written(config, plan_of, tmp_path):
    plan = plan_of(config())
    accept_plan(tmp_path / "out", plan)
    accept_plan(tmp_path / "out", plan)
    assert read_plan(tmp_path / "out") == plan
    assert read_plan(tmp_path / "out").digest == plan.digest


def test_a_plan_that_was_changed_by_hand_is_refused(config, plan_of, tmp_path):
    accept_plan(tmp_path, plan_of(config()))
    text = (tmp_path / PLAN).read_text()
    (tmp_path / PLAN).write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ShardError, match=r"plan\.json: was changed after it was written; draw the set anew"):
        read_plan(tmp_path)
    without = [line for line in text.splitlines() if "compile_blocks" not in line]
    (tmp_path / PLAN).write_text("\n".join(without))
    with pytest.raises(ShardError, match=r"plan\.json: cannot be read \(Field required\)"):
        read_plan(tmp_path)
    (tmp_path / PLAN).write_text(text[:-30])
    with pytest.raises(ShardError, match=r"plan\.json: cannot be read \(is not a plan\)"):
        read_plan(tmp_path)


def test_a_folder_without_a_plan_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"plan\.json: No such file or directory; name the folder of a set that"):
        read_plan(tmp_path)


def test_another_plan_in_the_same_folder_is_refused_with_the_fields_that_differ(config, plan_of, tmp_path):
    accept_plan(tmp_path, plan_of(config()))
    before = (tmp_path / PLAN).read_bytes()
    with pytest.raises(RunError) as refusal:
        accept_plan(tmp_path, plan_of(config("denoise_steps=3", "guidance_scale=1.5"), "ab" * 32))
    message = str(refusal.value)
    assert "plan.json: this set was begun with other settings:" in message
    for line in ("adapter_digest: untuned -> abababababab", "denoise_steps: 2 -> 3", "guidance_scale: 3.0 -> 1.5"):
        assert f"\n  {line}\n" in message
    assert message.count("->") == 3
    assert message.endswith("choose another out, or restore the settings")
    assert (tmp_path / PLAN).read_bytes() == before


def test_a_set_that_was_not_drawn_is_never_written_over(sources, config, plan_of):
    before = (sources / "shards" / MANIFEST).read_bytes()
    with pytest.raises(RunError, match="shards: holds shards that were not drawn; choose another out"):
        accept_plan(sources / "shards", plan_of(config()))
    assert (sources / "shards" / MANIFEST).read_bytes() == before
    assert not (sources / "shards" / PLAN).exists()


def test_a_missing_cache_is_named_with_the_command_that_makes_it(config, plan_of):
    with pytest.raises(CacheError, match=r"holds no cache for these settings.*run `ccmdist precompute"):
        plan_of(config("data.image_size_px=96"))


def test_a_split_without_samples_is_refused(config, plan_of):
    with pytest.raises(ConfigError, match=r"split: .*shards has no samples in val; choose another split"):
        plan_of(config("split=val"))


def test_a_key_that_would_become_too_long_is_refused(config, monkeypatch):
    nowhere = Member(0, 0, 0)
    entry = CacheEntry("k" * 60, "test-000000.tar", None, "s0", 9, nowhere, nowhere)
    with pytest.raises(
        ConfigError, match=r"is too long, k+-0000 has more than 64 characters; pack the shards with shorter"
    ):
        batches_of(config(), [entry])


def test_masks_of_training_subjects_bring_a_warning(config, plan_of, caplog):
    log.addHandler(caplog.handler)
    try:
        plan_of(config())
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        plan_of(config("split=train"))
    finally:
        log.removeHandler(caplog.handler)
    assert "images of training subjects' masks; `ccmdist release` refuses them by default" in caplog.text
