"""Filling holes with the real tiny model: what is kept, which adapter draws what, and that restarts change no byte."""

import logging
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from files_of_sets import contents
from small_sources import SIZE_PX, SOURCE_PX, config_for, source_triples, write_cache

from ccmdist.adapters.state import AdapterState
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.cli import exit_code
from ccmdist.config.train import LoRASettings
from ccmdist.console import log
from ccmdist.data.audit import audit_set
from ccmdist.data.holes import holes_of
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.manifest import commit_manifest, read_manifest
from ccmdist.data.reader import read_split, verify_set
from ccmdist.data.triple import mask_sha256, members_of
from ccmdist.data.views import views
from ccmdist.data.writer import write_set, write_shard
from ccmdist.diffusion.flow import pack_latents
from ccmdist.diffusion.seeding import generator
from ccmdist.errors import AdapterError, ConfigError, Preempted, RunError, ShardError
from ccmdist.jobs.synthesize import describe
from ccmdist.models import mmdit
from ccmdist.models.backbones import qwen
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis import base, generate
from ccmdist.synthesis.generate import adapter_digest, synthesize
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import read_plan
from ccmdist.synthesis.requests import Request
from ccmdist.synthesis.sampler import noise_of
from ccmdist.synthesis.verify import verify_against_plan

HOLES = ("data.holes.per_sample=3", "data.holes.shapes=[rectangle,band,everything]")
FILLING = ("objective=completion", "guidance_scale=1", *HOLES)
"""Ten filled holes in five batches and three shards."""
OWN = "k3"
"""Of the sample that brings a hole of its own."""


def own_hole():
    hole = np.zeros((SOURCE_PX, SOURCE_PX), bool)
    hole[30:50, 40:80] = True
    return hole


@pytest.fixture(scope="session")
def holed(tmp_path_factory):
    """Shards, a tiny model and a cache, as `sources` has them, with holes in the cache; one frame brings its own."""
    folder = tmp_path_factory.mktemp("holed")
    triples = ((split, replace(t, inpaint_mask=own_hole()) if t.key == OWN else t) for split, t in source_triples())
    manifest = write_set(folder / "shards", "phantom", triples, 3)
    make_model("tiny", "2509", folder / "model", seed=0)
    write_cache(config_for(folder, folder / "out", *FILLING, "data.flips=[hflip]").data, manifest)
    write_cache(config_for(folder, folder / "out", *FILLING).data, manifest)
    return folder


@pytest.fixture
def filling(holed, tmp_path):
    """A config that fills holes, with overrides, writing to out/ of the test."""
    return lambda *overrides, out="out": config_for(holed, tmp_path / out, *FILLING, *overrides)


@pytest.fixture(scope="session")
def filled(holed, tmp_path_factory):
    """The set that one uninterrupted worker draws."""
    out = tmp_path_factory.mktemp("filled") / "set"
    assert synthesize(config_for(holed, out, *FILLING), None)
    return out


def frames_of(holed, split="test", flips=()):
    """The source frames at the size of the run, by key."""
    return {view.key: view for t in read_split(holed / "shards", split) for view in views(t, SIZE_PX, flips, "")}


def test_outside_of_its_hole_an_image_has_the_bytes_of_its_frame_and_inside_it_is_drawn(holed, filled):
    frames, plan = frames_of(holed), read_plan(filled)
    holes = config_for(holed, filled, *FILLING).data.holes
    requests = {request.key: request for batch in plan.batches for request in batch.requests}
    triples = list(read_split(filled, "test"))
    assert sorted(triple.key for triple in triples) == [f"k{k}-c{n:04d}" for k in range(5) for n in range(2)]
    for triple in triples:
        request = requests[triple.key]
        source, hole = frames[request.source_key], triple.inpaint_mask
        assert np.array_equal(hole, holes_of(source, holes, SIZE_PX)[request.image_number % 3])
        assert np.array_equal(triple.image[~hole], source.image[~hole])
        assert (triple.image != source.image)[hole].mean() > 0.9
        assert np.array_equal(triple.nerve_mask, source.nerve_mask)
        about = triple.meta.provenance
        told = {name: about[name] for name in ("objective", "hole", "inpaint_mask_sha256", "adapter_digest")}
        assert told == {
            "objective": "completion",
            "hole": request.image_number,
            "inpaint_mask_sha256": mask_sha256(hole),
            "adapter_digest": "untuned",
        }
        assert b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in members_of(triple)["image.png"]
        assert request.source_key != OWN or np.array_equal(hole, frames[OWN].inpaint_mask)
    verify_set(filled)
    assert "hold pixels, codes, numbers and digests only" in audit_set(filled, read_manifest(filled))


@pytest.mark.parametrize("order", [[0], [1, 0], [2, 0, 1]])
def test_any_number_of_workers_and_a_restart_write_the_same_bytes(order, filling, filled, one_model, tmp_path):
    with pytest.raises(Preempted):
        synthesize(filling(), None, should_stop=iter([False, True]).__next__)
    complete = [synthesize(filling(), None, worker, len(order)) for worker in order]
    assert complete[-1]
    assert contents(tmp_path / "out") == contents(filled)


def test_flipped_views_are_filled_in_holes_of_their_own(holed, filling, one_model, tmp_path):
    synthesize(filling("split=train", "data.flips=[hflip]", "images_per_mask=1"), None)
    frames = frames_of(holed, "train", ["hflip"])
    triples = {triple.key: triple for triple in read_split(tmp_path / "out", "train")}
    assert sorted(triples) == ["k5-c0000", "k5-hflip-c0000", "k6-c0000", "k6-hflip-c0000"]
    for triple in triples.values():
        source, hole = frames[triple.meta.provenance["source_key"]], triple.inpaint_mask
        assert np.array_equal(triple.image[~hole], source.image[~hole])
    told = verify_against_plan(tmp_path / "out", holed / "shards")
    assert "4 of the images are their frames, byte by byte, outside of their holes" in told


def test_holes_change_what_is_drawn_in_them_and_more_images_than_holes_come_round_again(filling, one_model, tmp_path):
    synthesize(filling("images_per_mask=4", "batch_size=4", "denoise_steps=2"), None)
    plan = read_plan(tmp_path / "out")
    assert Counter(request.hole for batch in plan.batches for request in batch.requests) == {0: 10, 1: 5, 2: 5}
    triples = {triple.key: triple for triple in read_split(tmp_path / "out", "test")}
    first, again = triples["k0-c0000"], triples["k0-c0003"]
    assert np.array_equal(first.inpaint_mask, again.inpaint_mask)
    assert (first.image != again.image)[first.inpaint_mask].any()


def test_the_model_sees_structure_and_holed_image_and_keeps_what_is_known(filling, one_model, monkeypatch):
    seen, draw = [], generate.sample
    conditions, predict = [], qwen.GuidedVelocity

    def watched(velocity, noise_BSC, sigmas, guidance_scale, known, guidance):
        seen.append(known)
        return draw(velocity, noise_BSC, sigmas, guidance_scale, known, guidance)

    def shown(model, condition_BSC, *others):
        conditions.append(condition_BSC)
        return predict(model, condition_BSC, *others)

    monkeypatch.setattr(generate, "sample", watched)
    monkeypatch.setattr(qwen, "GuidedVelocity", shown)
    config = filling()
    synthesize(config, None)
    model = ModelFolder.open(config.data.model)
    cache = LatentCache.open(config.data, model.encoder_identity(), ("test",))
    samples = {entry.key: cache.read(entry) for entry in cache.entries("test")}
    num_tokens = (SIZE_PX // 16) ** 2
    batches = read_plan(config.out).batches
    for batch, known, condition_BSC in zip(batches, seen, conditions, strict=True):
        for place, request in enumerate(batch.requests):
            sample = samples[request.source_key]
            holed_SC = pack_latents(sample["holed_latents"][request.hole][None])[0]
            assert torch.equal(known.latents_BSC[place], holed_SC)
            assert torch.equal(condition_BSC[place, :num_tokens], pack_latents(sample["mask_latents"][None])[0])
            assert torch.equal(condition_BSC[place, num_tokens:], holed_SC)
            hole = np.unpackbits(sample["holes"][request.hole].numpy(), axis=1).astype(bool)
            is_open = hole.reshape(SIZE_PX // 16, 16, SIZE_PX // 16, 16).any(axis=(1, 3)).ravel()
            assert known.is_open_BS[place].tolist() == is_open.tolist()


def test_a_filled_hole_and_a_whole_image_of_one_number_have_noise_of_their_own():
    whole, hole = Request("k-0000", "k", 0, "s", None), Request("k-c0000", "k", 0, "s", None, hole=0)
    noise = [noise_of(0, request, (4, 4)) for request in (whole, hole)]
    assert not torch.equal(*noise)
    # As it was before there were holes.
    assert torch.equal(noise[0], torch.randn(4, 4, generator=generator(0, "synthesis", "k", 0)))


def adapter(holed, name, seed, **facts):
    """A LoRA of one linear, made for an objective."""
    source = torch.Generator().manual_seed(seed)
    shape = ModelFolder.open(holed / "model").config("transformer")
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    tensors = {
        "transformer_blocks.0.attn.to_q": {
            "lora_A": torch.randn(2, width, generator=source),
            "lora_B": torch.randn(width, 2, generator=source),
        }
    }
    about = {"base_digest": ModelFolder.open(holed / "model").transformer_digest()}
    about |= {"adapter_name": name} if name else {}
    return AdapterState(LoRASettings(lora_rank=2, targets=("attn.to_q",)), tensors, about | facts)


@pytest.fixture
def pair(holed):
    return {"synthesis": adapter(holed, "synthesis", 0), "completion": adapter(holed, "completion", 1)}


def test_both_objectives_are_drawn_in_one_set_each_by_its_own_adapter(holed, filling, pair, tmp_path):
    assert synthesize(filling("objective=both", "images_per_mask=1"), pair)
    plan = read_plan(tmp_path / "out")
    assert [batch.objective for batch in plan.batches] == ["synthesis"] * 3 + ["completion"] * 3
    assert plan.settings.adapter_digest == adapter_digest(pair["synthesis"])
    assert plan.settings.completion_digest == adapter_digest(pair["completion"])
    for objective, state in pair.items():
        alone = tmp_path / objective
        synthesize(filling(f"objective={objective}", "images_per_mask=1", out=objective), {objective: state})
        found = {t.key: t for t in read_split(tmp_path / "out", "test")}
        for triple in read_split(alone, "test"):
            assert np.array_equal(found[triple.key].image, triple.image)
            assert found[triple.key].meta.provenance["adapter_digest"] == adapter_digest(state)
            assert (triple.inpaint_mask is None) == (objective == "synthesis")
    assert "all 10 images" in verify_against_plan(tmp_path / "out", holed / "shards")
    assert "10 images of 5 masks in 6 batches" in describe(
        filling("objective=both", "images_per_mask=1", f"adapter={tmp_path}/adapter")
    )


@pytest.mark.parametrize("worker", [0, 1])
def test_the_adapter_is_changed_once_in_the_own_share_and_once_at_most_in_each_round_of_help(
    worker, filling, pair, one_model, monkeypatch
):
    loaded, drawn, load = [], [], base.load

    def counted(folder, settings, adapter, device):
        loaded.append(adapter)
        return load(folder, settings, None, device)

    def watched(self, batch, draw=generate.Worker._draw):
        drawn.append(self.output.plan.batches[batch].objective)
        draw(self, batch)

    monkeypatch.setattr(generate.base, "load", counted)
    monkeypatch.setattr(generate.Worker, "_draw", watched)
    assert synthesize(filling("objective=both", "batch_size=1", "images_per_mask=1"), pair, worker, 3)
    own, helped = drawn[:4], drawn[4:]
    assert own == ["synthesis"] * 2 + ["completion"] * 2 if worker == 0 else own == sorted(own, reverse=True)
    # What is merged is used up before the other one is merged again.
    assert helped == ["completion"] * helped.count("completion") + ["synthesis"] * helped.count("synthesis")
    assert loaded == [pair["synthesis"], pair["completion"], pair["synthesis"]]


def test_the_untuned_model_is_loaded_once_for_both(filling, monkeypatch):
    loaded, build = [], mmdit.build
    monkeypatch.setattr(mmdit, "build", lambda *a, **b: loaded.append(1) or build(*a, **b))
    assert synthesize(filling("objective=both", "images_per_mask=1"), None)
    assert len(loaded) == 1


@pytest.mark.parametrize(("name", "told"), [("synthesis", "synthesis"), (None, "synthesis")])
def test_an_adapter_of_another_objective_is_refused_and_leaves_no_plan(holed, filling, name, told, tmp_path):
    config = filling(f"adapter={tmp_path}/adapter")
    with pytest.raises(AdapterError) as refusal:
        synthesize(config, adapter(holed, name, 0))
    assert str(refusal.value) == (
        f"{tmp_path}/adapter: was trained for {told}, objective completion takes one for completion; name the run of "
        f"objective.kind dual that has trained completion, or set objective={told}"
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_shown_what_it_was_trained_on_or_is_refused_and_leaves_no_plan(holed, filling, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        synthesize(filling(f"adapter={tmp_path}/a"), adapter(holed, "completion", 0, structure="points"))
    assert str(refusal.value) == (
        f"data.structure: mask, but {tmp_path}/a was trained on points; set data.structure=points, for precompute too, "
        "or name what was trained on mask"
    )
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_fills_holes_draws_no_whole_images(holed, filling):
    with pytest.raises(AdapterError, match="was trained for completion, objective synthesis takes one for synthesis"):
        synthesize(filling("objective=synthesis"), adapter(holed, "completion", 0))


def test_filling_without_holes_and_with_a_network_is_refused(sources, filling):
    with pytest.raises(ConfigError, match=r"data\.holes: objective completion fills holes; set data\.holes, for"):
        config_for(sources, "out", "objective=completion")
    with pytest.raises(ConfigError, match="objective: network draws whole images only; fill holes with adapter="):
        filling("network=runs/spade")


def test_frames_that_are_resized_are_told_of_once(filling, filled, one_model, caplog):
    log.addHandler(caplog.handler)
    caplog.set_level(logging.INFO)
    try:
        synthesize(filling("images_per_mask=1"), None)
    finally:
        log.removeHandler(caplog.handler)
    told = "frames of 96 px are resized to the 64 px of the run; outside of its hole, an image has the bytes of the"
    assert len({id(record) for record in caplog.records if told in record.getMessage()}) == 1


def test_the_proof_finds_a_pixel_that_changed_outside_of_a_hole_another_hole_and_none(sources, holed, filled, tmp_path):
    plan, manifest = read_plan(filled), read_manifest(filled)
    assert "10 of the images are their frames, byte by byte" in verify_against_plan(filled, holed / "shards")
    assert verify_against_plan(filled).endswith(
        "whether 10 of the images are their frames outside of their holes takes --source"
    )
    with pytest.raises(
        RunError, match=r"sources.*/shards: is the set [0-9a-f]{12}, the plan draws from [0-9a-f]{12}; n"
    ):
        verify_against_plan(filled, sources / "shards")

    def changed(name, change):
        SyntheticSet(tmp_path / name, plan).accept()
        entries = [
            write_shard(tmp_path / name, entry.name, "test", [change(t) for t in read_split_of(filled, entry)])
            for entry in manifest.shards
        ]
        commit_manifest(tmp_path / name, "synthetic", entries)
        with pytest.raises(ShardError) as problem:
            verify_against_plan(tmp_path / name, holed / "shards")
        return problem.value.message

    def one_pixel(triple):
        image = triple.image.copy()
        image[tuple(np.argwhere(~triple.inpaint_mask)[0] if not triple.inpaint_mask.all() else (0, 0))] ^= 1
        return replace(triple, image=image) if triple.key == "k0-c0000" else triple

    def another_hole(triple):
        hole = np.roll(triple.inpaint_mask, 1, axis=0)
        about = triple.meta.provenance | {"inpaint_mask_sha256": mask_sha256(hole)}
        image = np.where(hole, triple.image, frames_of(holed)[about["source_key"]].image)
        return replace(triple, inpaint_mask=hole, image=image, meta=replace(triple.meta, provenance=about))

    assert re.search(r"k0-c0000 differs from k0 in 1 pixels outside of its hole", changed("pixel", one_pixel))
    assert "k0-c0000 has another hole than the plan cuts" in changed("hole", another_hole)
    assert "has no hole that was filled" in changed("none", lambda triple: replace(triple, inpaint_mask=None))


def read_split_of(folder, entry):
    wanted = {triple.key: triple for triple in read_split(folder, "test")}
    plan = read_plan(folder)
    shard = int(entry.name[-10:-4])
    return [wanted[request.key] for batch in plan.batches_of_shard(shard) for request in plan.batches[batch].requests]


def test_the_option_means_the_same_as_the_setting_and_a_dry_run_tells_what_is_filled(holed, filled, tmp_path, capsys):
    yaml = Path(__file__).parents[3] / "configs" / "synthesize" / "tiny.yaml"
    small = ["data.image_size_px=64", "images_per_mask=2", "batch_size=2", "batches_per_shard=2", "denoise_steps=2"]
    places = [f"data.{name}={holed}/{name}" for name in ("shards", "model", "cache")]
    command = ["synthesize", str(yaml), f"out={tmp_path}/out", *places, *small, *HOLES, "--objective", "completion"]
    assert exit_code([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert '"objective": "completion"' in shown
    assert (
        "all images fill holes (rectangle, band, everything; 3 of each frame, or the one that a frame brings)" in shown
    )
    assert exit_code(command) == 0
    assert contents(tmp_path / "out") == contents(filled)
    verify = ["shards", "verify", str(tmp_path / "out"), "--source", str(holed / "shards")]
    assert exit_code([*verify, "--plan"]) == 0
    assert exit_code(verify) == 78


def test_a_dry_run_names_the_adapters_of_both_objectives(filling, tmp_path):
    told = describe(filling("objective=both", f"adapter={tmp_path}/adapter"))
    assert f"adapters synthesis and completion of {tmp_path}/adapter" in told
    assert "half of the images fill holes" in told
    assert f"adapter completion of {tmp_path}/adapter" in describe(filling(f"adapter={tmp_path}/adapter"))


def test_groups_are_those_of_the_frames(filled):
    groups = {triple.meta.clinical_group for triple in read_split(filled, "test")}
    assert groups == {*CLINICAL_GROUPS, None}
