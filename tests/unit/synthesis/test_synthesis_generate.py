"""Drawing with the real tiny model: what a sample holds, and that workers, kills and restarts change no byte."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files_of_sets import contents, images_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ccmdist import commit
from ccmdist.adapters.state import AdapterState
from ccmdist.cli import exit_code
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.data.manifest import MANIFEST, read_manifest
from ccmdist.data.reader import read_shard, read_split, verify_set
from ccmdist.data.triple import mask_sha256, members_of
from ccmdist.data.views import resized_mask
from ccmdist.errors import AdapterError, Preempted, RunError, ShardError
from ccmdist.jobs.synthesize import describe
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import output as output_module
from ccmdist.synthesis.generate import adapter_digest, synthesize
from ccmdist.synthesis.output import BATCHES, SyntheticSet
from ccmdist.synthesis.plan import PLAN, read_plan
from ccmdist.synthesis.verify import verify_against_plan


def test_a_set_is_complete_and_says_what_it_is(drawn):
    manifest = read_manifest(drawn)
    plan = read_plan(drawn)
    assert manifest.kind == "synthetic"
    assert [(shard.name, shard.num_samples) for shard in manifest.shards] == [
        ("test-000000.tar", 4),
        ("test-000001.tar", 4),
        ("test-000002.tar", 2),
    ]
    assert manifest.about["plan_digest"] == plan.digest
    assert manifest.about["adapter_digest"] == "untuned"
    assert sorted(contents(drawn)) == [MANIFEST, PLAN, *(shard.name for shard in manifest.shards)]
    assert "10 samples" in str(verify_set(drawn))
    assert verify_against_plan(drawn).endswith("are there once, in 3 shards, and nothing else")


def test_a_sample_has_its_sources_mask_and_prompt_and_its_own_provenance(sources, drawn):
    plan = read_plan(drawn)
    source_of = {triple.key: triple for triple in read_split(sources / "shards", "test")}
    requests = {
        request.key: (number, request) for number, batch in enumerate(plan.batches) for request in batch.requests
    }
    for triple in read_split(drawn, "test"):
        number, request = requests[triple.key]
        source = source_of[request.source_key]
        assert np.array_equal(triple.nerve_mask, resized_mask(source.nerve_mask, 64))
        assert triple.meta == replace(
            source.meta,
            source="synthetic",
            um_per_px=source.meta.um_per_px * 96 / 64,
            labels={},
            provenance={
                "source_key": source.key,
                "source_set_digest": read_manifest(sources / "shards").digest,
                "image_number": request.image_number,
                "mask_sha256": mask_sha256(triple.nerve_mask),
                "seed": 0,
                "base_digest": ModelFolder.open(sources / "model").transformer_digest(),
                "base": "fp32",
                "adapter_digest": "untuned",
                "denoise_steps": 2,
                "guidance_scale": 3.0,
                "plan_digest": plan.digest,
                "batch": number,
            },
        )
        assert b"trainedAlgorithmicMedia" in members_of(triple)["image.png"]
        assert triple.image.shape == (64, 64)
        assert triple.image.std() > 1


def test_every_image_is_another(drawn):
    assert len({image.tobytes() for image in images_of(drawn).values()}) == 10


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), num_workers=st.integers(1, 6))
def test_any_number_of_workers_in_any_order_writes_the_same_bytes(
    data, num_workers, config, drawn, one_model, tmp_path
):
    workers = data.draw(st.permutations(range(num_workers)))
    out = f"set-{len(list(tmp_path.iterdir()))}"
    complete = [synthesize(config(out=out), None, worker, num_workers) for worker in workers]
    assert complete[-1]
    assert contents(tmp_path / out) == contents(drawn)


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


def counting(monkeypatch, kill_at):
    """Kill before operation number ``kill_at`` of those that put something on the disk; counts them."""
    done = []

    def counted(operation):
        def call(*arguments, **named):
            if len(done) == kill_at:
                raise Killed
            done.append(operation.__name__)
            return operation(*arguments, **named)

        return call

    for owner, name in ((commit, "sync_file"), (commit, "sync_folder"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return done


def test_killed_at_any_operation_and_resumed_the_set_is_the_same(config, drawn, remembered, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        done = counting(patch, kill_at=-1)
        synthesize(config(out="counted"), None)
        num_operations = len(done)
    assert num_operations > 40
    expected = contents(drawn)
    assert contents(tmp_path / "counted") == expected
    for kill_at in range(num_operations):
        out = tmp_path / f"killed-{kill_at}"
        killed = config().model_copy(update={"out": out})
        with monkeypatch.context() as patch, pytest.raises(Killed):
            counting(patch, kill_at)
            synthesize(killed, None)
        # What the kill left is done by two other workers.
        synthesize(killed, None, 1, 2)
        assert synthesize(killed, None, 0, 2)
        assert contents(out) == expected, f"killed before operation {kill_at}"


def test_what_a_kill_left_under_a_temporary_name_is_cleared_away(config, drawn, remembered, tmp_path):
    with pytest.raises(Preempted):
        synthesize(config(), None, should_stop=iter([False, True]).__next__)
    for place in (".test-000000.tar", f"{BATCHES}/.test-000000.tar", ".plan.json", ".manifest.json"):
        (tmp_path / "out" / f"{place}.tmp-1-abc").write_bytes(b"half")
    synthesize(config(), None)
    assert contents(tmp_path / "out") == contents(drawn)


def test_a_stop_between_batches_keeps_what_is_drawn(config, drawn, remembered, tmp_path):
    with pytest.raises(Preempted, match=r"stopped with 3 of 5 batches drawn and committed; run the same command again"):
        synthesize(config(), None, should_stop=iter([False] * 3 + [True]).__next__)
    first = (tmp_path / "out" / "test-000000.tar").stat().st_mtime_ns
    assert "3 batches are committed" in describe(config())
    assert synthesize(config(), None)
    assert contents(tmp_path / "out") == contents(drawn)
    assert (tmp_path / "out" / "test-000000.tar").stat().st_mtime_ns == first


def test_a_complete_set_is_left_alone(config, remembered, tmp_path, monkeypatch):
    synthesize(config(), None)
    done = counting(monkeypatch, kill_at=-1)
    assert synthesize(config(), None)
    assert set(done) <= {"unlink"}


def test_a_plan_with_other_settings_is_refused_before_anything_is_drawn(config, remembered, tmp_path):
    synthesize(config(), None)
    before = contents(tmp_path / "out")
    with pytest.raises(RunError, match=r"begun with other settings:\n  seed: 0 -> 1\nchoose another out"):
        synthesize(config("seed=1"), None)
    with pytest.raises(RunError, match=r"\n  seed: 0 -> 1\n"):
        describe(config("seed=1"))
    assert contents(tmp_path / "out") == before


def test_a_worker_that_comes_late_to_a_shard_lets_the_other_ones_shard_stand(
    config, drawn, remembered, tmp_path, monkeypatch
):
    with pytest.raises(Preempted):
        synthesize(config(), None, should_stop=iter([False, True]).__next__)
    output = SyntheticSet(tmp_path / "out", read_plan(tmp_path / "out"))
    write_shard = output_module.write_shard

    def overtaken(folder, name, *others):
        if folder.name == "out" and name == "test-000000.tar":
            monkeypatch.setattr(output_module, "write_shard", write_shard)
            output.assemble(0)  # by another worker, who also removes the batches
            assert not (folder / BATCHES / name).exists()
        return write_shard(folder, name, *others)

    monkeypatch.setattr(output_module, "write_shard", overtaken)
    assert synthesize(config(), None)
    assert output_module.write_shard is write_shard, "the race was not staged"
    assert contents(tmp_path / "out") == contents(drawn)


def test_a_damaged_batch_is_named_and_drawn_again_once_it_is_removed(config, drawn, remembered, tmp_path):
    with pytest.raises(Preempted):
        synthesize(config(), None, should_stop=iter([False, True]).__next__)
    path = tmp_path / "out" / BATCHES / "test-000000.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=r"batches/test-000000\.tar: .*; remove .* and run the same command again"):
        synthesize(config(), None)
    path.unlink()
    assert synthesize(config(), None)
    assert contents(tmp_path / "out") == contents(drawn)


def test_an_image_depends_on_its_request_not_on_its_batch(config, drawn, one_model, tmp_path):
    synthesize(config("batch_size=5", "images_per_mask=3"), None)
    found, expected = images_of(tmp_path / "out"), images_of(drawn)
    for key, image in expected.items():
        # A batch of another size adds floats in another order: at most the last grey level differs.
        assert np.abs(image.astype(int) - found[key]).max() <= 1, key


def test_seed_guidance_and_steps_change_images(config, drawn, one_model, tmp_path):
    for change in ("seed=1", "guidance_scale=1", "denoise_steps=3"):
        synthesize(config(change, "images_per_mask=1", out=change), None)
        image = images_of(tmp_path / change)["k0-0000"]
        assert np.abs(image.astype(int) - images_of(drawn)["k0-0000"]).max() > 1, change


def test_flipped_views_of_train_are_drawn_with_flipped_masks(sources, config, one_model, tmp_path):
    synthesize(config("split=train", "images_per_mask=1", "data.flips=[hflip]"), None)
    triples = {triple.key: triple for triple in read_split(tmp_path / "out", "train")}
    assert sorted(triples) == ["k5-0000", "k5-hflip-0000", "k6-0000", "k6-hflip-0000"]
    assert [triples[key].meta.eye for key in sorted(triples)] == ["OD", "OS"] * 2
    assert all(f"eye {triple.meta.eye}" in triple.meta.prompt for triple in triples.values())
    for key in ("k5", "k6"):
        plain, flipped = triples[f"{key}-0000"], triples[f"{key}-hflip-0000"]
        assert np.array_equal(flipped.nerve_mask, plain.nerve_mask[:, ::-1])
        assert flipped.meta.subject == plain.meta.subject
        assert flipped.meta.um_per_px == plain.meta.um_per_px
    assert "4 images" in verify_against_plan(tmp_path / "out", sources / "shards")


def adapter(sources, kind, size, base_digest=None):
    """An adapter of two linears whose B is ``size`` times noise."""
    from safetensors.torch import load_file

    names = [f"transformer_blocks.{block}.attn.to_q" for block in (0, 1)]
    weights = {}
    for file in (sources / "model" / "transformer").glob("*.safetensors"):
        weights |= load_file(file)
    source, tensors = torch.Generator().manual_seed(0), {}
    for name in names:
        W = weights[f"{name}.weight"].float()
        tensors[name] = {
            "lora_A": torch.randn(2, W.shape[1], generator=source),
            "lora_B": torch.randn(W.shape[0], 2, generator=source) * size,
        }
        if kind == "wdlora":
            tensors[name]["magnitude"] = W.norm(dim=1)
    kinds = {"wdlora": WDLoRASettings, "lora": LoRASettings}
    base = base_digest or ModelFolder.open(sources / "model").transformer_digest()
    return AdapterState(kinds[kind](lora_rank=2, targets=("attn.to_q",)), tensors, {"base_digest": base})


@pytest.mark.parametrize("kind", ["wdlora", "lora"])
def test_an_adapter_is_merged_and_named_in_every_sample(kind, sources, config, drawn, tmp_path):
    for name, size, changes in (("zero", 0.0, False), ("tuned", 1.0, True)):
        state = adapter(sources, kind, size)
        synthesize(config("images_per_mask=1", out=name), state)
        triples = {triple.key: triple for triple in read_split(tmp_path / name, "test")}
        assert {t.meta.provenance["adapter_digest"] for t in triples.values()} == {adapter_digest(state)}
        difference = np.abs(triples["k0-0000"].image.astype(int) - images_of(drawn)["k0-0000"]).max()
        assert (difference > 1) == changes, (name, difference)


def test_the_digest_of_an_adapter_covers_kind_scale_and_tensors(sources):
    state = adapter(sources, "wdlora", 1.0)
    others = [
        adapter(sources, "lora", 1.0),
        adapter(sources, "wdlora", 2.0),
        replace(state, settings=WDLoRASettings(lora_rank=2, alpha=4.0, targets=("attn.to_q",))),
        replace(state, tensors=dict(list(state.tensors.items())[:1])),
    ]
    assert len({adapter_digest(other) for other in [state, *others]}) == 5
    assert adapter_digest(replace(state, facts={})) == adapter_digest(state)


def test_an_adapter_of_another_base_is_refused_and_leaves_no_plan(sources, config, tmp_path):
    base = ModelFolder.open(sources / "model").transformer_digest()
    named = config(f"adapter={tmp_path}/adapter")
    with pytest.raises(AdapterError) as refusal:
        synthesize(named, adapter(sources, "wdlora", 1.0, base_digest="f" * 64))
    assert str(refusal.value) == (
        f"{tmp_path}/adapter: was trained on the base ffffffffffff, {sources}/model holds {base[:12]}; "
        "set data.model to the model that the adapter was trained on"
    )
    assert not (tmp_path / "out").exists()


def test_an_image_that_is_not_finite_is_refused_by_name(sources, config):
    state = adapter(sources, "lora", 1.0)
    for tensors in state.tensors.values():
        tensors["lora_B"].fill_(3e38)
    with pytest.raises(
        RunError, match=r"2 of 2 images of a batch are not finite \(first: k2-0000\); check the adapter"
    ):
        synthesize(config(), state)


def test_without_guidance_the_negative_prompt_is_not_read(config, one_model, monkeypatch):
    from ccmdist.data.latent_cache import LatentCache

    monkeypatch.setattr(LatentCache, "read_negatives", None)
    assert synthesize(config("guidance_scale=1", "images_per_mask=1"), None)


def test_the_command_draws_verifies_and_tells_of_a_stop(sources, config, drawn, tmp_path, monkeypatch):
    yaml = Path(__file__).parents[3] / "configs" / "synthesize" / "tiny.yaml"
    small = ["data.image_size_px=64", "images_per_mask=2", "batch_size=2", "batches_per_shard=2", "denoise_steps=2"]
    places = [f"data.{name}={sources}/{name}" for name in ("shards", "model", "cache")]
    command = ["synthesize", str(yaml), f"out={tmp_path}/out", *places, *small, "guidance_scale=3"]
    assert exit_code([*command, "--dry-run"]) == 0
    assert not (tmp_path / "out").exists()
    commit_batch = SyntheticSet.commit_batch

    def stopped(self, batch, triples):
        commit_batch(self, batch, triples)
        os.kill(os.getpid(), 10)  # SIGUSR1

    with monkeypatch.context() as patch:
        patch.setattr(SyntheticSet, "commit_batch", stopped)
        assert exit_code(command) == 75
    assert exit_code(command) == 0
    assert contents(tmp_path / "out") == contents(drawn)
    assert exit_code(["shards", "verify", str(tmp_path / "out"), "--plan"]) == 0
    assert exit_code(["shards", "verify", str(sources / "shards"), "--plan"]) == 78


def test_a_shard_is_read_back_by_the_sets_own_manifest(drawn):
    for shard in read_manifest(drawn).shards:
        assert len(list(read_shard(drawn, shard))) == shard.num_samples
