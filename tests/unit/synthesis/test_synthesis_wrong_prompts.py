"""The control with wrong prompts, from encoder to image on the tiny model: the mask is given, the prompt another's."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from ccmdist.ccm.groups import CLINICAL_GROUPS, next_group
from ccmdist.config.data import DataSettings, PrecomputeConfig
from ccmdist.config.loading import load, resolved
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import command, fingerprint
from ccmdist.data.latent_cache import LatentCache
from ccmdist.data.phantom_shards import sample
from ccmdist.data.reader import read_split
from ccmdist.data.triple import prompt_for
from ccmdist.data.writer import write_set
from ccmdist.errors import ConfigError, ShardError
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.precompute.fill import fill_cache
from ccmdist.precompute.plan import fill_plan
from ccmdist.synthesis import generate
from ccmdist.synthesis.output import misfit
from ccmdist.synthesis.plan import read_plan
from ccmdist.synthesis.verify import verify_against_plan

SIZE_PX = 64


def in_group(triple, group):
    return replace(
        triple, meta=replace(triple.meta, clinical_group=group, prompt=prompt_for(group, triple.meta.eye, {}))
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A phantom of each group; twin: the same frames, said to be of the next group; both cached with given prompts."""
    folder = tmp_path_factory.mktemp("wrong")
    phantoms = [sample(0, group, 0, 0, SIZE_PX) for group in CLINICAL_GROUPS]
    write_set(folder / "shards", "phantom", (("test", one) for one in phantoms), 8)
    twins = [in_group(one, next_group(one.meta.clinical_group)) for one in phantoms]
    write_set(folder / "twin", "phantom", (("test", one) for one in twins), 8)
    make_model("tiny", "2509", folder / "model")
    for prompts, shards in (("given", "shards"), ("next_group", "shards"), ("given", "twin")):
        fill_cache(PrecomputeConfig(data=settings(folder, prompts, shards), splits=("test",)), 0, 1)
    return folder


def settings(folder, prompts, shards="shards"):
    return DataSettings(
        shards=folder / shards,
        model=folder / "model",
        cache=folder / "cache",
        image_size_px=SIZE_PX,
        dtype="fp32",
        prompts=prompts,
    )


def drawn(folder, prompts):
    out = folder / f"drawn-{prompts}"
    config = SynthesizeConfig(
        out=out, data=settings(folder, prompts), batch_size=3, denoise_steps=2, guidance_scale=2.0, split="test"
    )
    assert generate.synthesize(config, None)
    return out


@pytest.fixture(scope="module")
def sets(world):
    return {prompts: drawn(world, prompts) for prompts in ("given", "next_group")}


def cached(data):
    cache = LatentCache.open(data, ModelFolder.open(data.model).encoder_identity(), ["test"])
    return {entry.key: (entry, cache.read(entry)) for entry in cache.entries("test")}


def test_a_mask_is_encoded_with_the_prompt_of_the_next_group_and_keeps_its_own(world):
    wrong, given, twin = (cached(settings(world, *which)) for which in (("next_group",), ("given",), ("given", "twin")))
    for key, (entry, tensors) in wrong.items():
        assert entry.clinical_group == given[key][0].clinical_group
        assert torch.equal(tensors["mask_latents"], given[key][1]["mask_latents"])
        assert torch.allclose(tensors["prompt_embeds"], twin[key][1]["prompt_embeds"], atol=1e-6)
        assert not torch.allclose(tensors["prompt_embeds"], given[key][1]["prompt_embeds"], atol=1e-3)


def test_a_sample_tells_the_wrong_prompt_and_the_group_of_its_mask(world, sets):
    sources = {triple.key: triple for triple in read_split(world / "shards", "test")}
    for triple in read_split(sets["next_group"], "test"):
        about = triple.meta.provenance
        source = sources[about["source_key"]]
        wrong = next_group(source.meta.clinical_group)
        assert triple.meta.clinical_group == source.meta.clinical_group
        assert triple.meta.prompt == prompt_for(wrong, triple.meta.eye, {}) != source.meta.prompt
        assert (about["prompts"], about["prompted_group"]) == ("next_group", wrong)
        assert np.array_equal(triple.nerve_mask, source.nerve_mask)
    assert "3 images" in verify_against_plan(sets["next_group"])


def test_the_same_noise_and_mask_with_another_prompt_make_another_image(sets):
    given, wrong = (
        {triple.key: triple for triple in read_split(sets[prompts], "test")} for prompts in ("given", "next_group")
    )
    assert given.keys() == wrong.keys()
    assert all((given[key].image != wrong[key].image).any() for key in given)


def test_a_sample_whose_prompt_is_not_the_plans_is_found(sets):
    plan = read_plan(sets["next_group"])
    request = plan.batches[0].requests[0]
    triple = next(one for one in read_split(sets["next_group"], "test") if one.key == request.key)
    assert misfit(plan, 0, request, triple) == ""
    right = in_group(triple, triple.meta.clinical_group)
    assert misfit(plan, 0, request, right) == "has another prompt than in the plan"


def test_given_prompts_leave_no_trace_in_fingerprint_settings_plan_and_provenance(world, sets):
    data = settings(world, "given")
    assert "prompts" not in fingerprint(data, "0" * 64, {}) | resolved(data)
    assert fingerprint(settings(world, "next_group"), "0" * 64, {})["prompts"] == "next_group"
    assert "prompts" not in read_plan(sets["given"]).summary()
    about = next(read_split(sets["given"], "test")).meta.provenance
    assert not {"prompts", "prompted_group"} & about.keys()
    assert "data.prompts=next_group" in command(settings(world, "next_group"))
    assert "prompts" not in command(data)


def test_unlabelled_frames_have_no_next_group_and_are_refused(world, tmp_path):
    frames = [sample(0, "Control", 1, 0, SIZE_PX), in_group(sample(0, "Control", 2, 0, SIZE_PX), None)]
    write_set(tmp_path / "shards", "phantom", (("test", one) for one in frames), 8)
    data = settings(world, "next_group").model_copy(update={"shards": tmp_path / "shards"})
    with pytest.raises(
        ShardError,
        match=r"1 of 2 samples of test are unlabelled, and data\.prompts next_group needs a clinical group to have a "
        r"next one; leave unlabelled frames out of the set, name only splits without them, or set data\.prompts=given",
    ):
        fill_plan(PrecomputeConfig(data=data, splits=("test",)), ModelFolder.open(data.model))


def test_training_on_wrong_prompts_is_refused(world, tmp_path):
    overrides = [f"run={tmp_path}", f"data.shards={world}/shards", f"data.model={world}/model"]
    load(TrainConfig, [], overrides)
    with pytest.raises(ConfigError, match=r"data\.prompts: next_group is a control of synthesis; training wants the"):
        load(TrainConfig, [], [*overrides, "data.prompts=next_group"])
