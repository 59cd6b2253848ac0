"""Segmenting and diagnosing: the model is given nothing that tells the group, and what cannot be learnt is refused."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from ccmdist.ccm.groups import CLINICAL_GROUPS, next_group
from ccmdist.config.data import PhantomShardsConfig
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.manifest import read_manifest
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.data.reader import read_shard
from ccmdist.data.stream import collated
from ccmdist.data.triple import prompt_for
from ccmdist.data.writer import write_set
from ccmdist.errors import ConfigError, ModelError
from ccmdist.evaluation.downstream.scores import balanced_accuracy, macro_auc
from ccmdist.jobs.train import describe
from ccmdist.models.fusion import overlay
from ccmdist.models.network_folder import NetworkAbout
from ccmdist.synthesis.planning import _refuse_network
from ccmdist.train.capabilities import refuse_missing_groups
from ccmdist.train.objectives.choice import objective_of
from ccmdist.train.objectives.diagnose import DiagnosisSource, labels_of
from ccmdist.train.objectives.group_scores import group_scores
from ccmdist.train.objectives.spade import NO_BASE
from tests.small_mdf import KINDS, make_mllms
from tests.unit.train.asked_model import OneRank

SIZE_PX = 64
OF_UNET = ["adapter=null", "base=null", "global_batch_size=4", "micro_batch_size=4", "run=none"]
CHANNELS = "channels: [4, 4, 8, 8, 16, 4]"


class Alone(OneRank):
    """That gathers, too."""

    def gathered(self, value):
        return [value]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    settings = {"subjects_per_group": 4, "frames_per_subject": 1, "size_px": SIZE_PX, "val_fraction": 0.3}
    write_phantom_set(PhantomShardsConfig(out=folder / "shards", **settings))
    make_mllms(folder)
    return folder


def config(world, objective, *overrides):
    data = [f"data.shards={world}/shards", "data.model=none", f"data.image_size_px={SIZE_PX}"]
    return load(TrainConfig, [], [f"objective={{{objective}, {CHANNELS}}}", *OF_UNET, *data, *overrides])


def segmenting(world):
    return objective_of(config(world, "kind: segment"), Alone())


def diagnosing(world, kind="mllama", *overrides):
    said = f"kind: diagnose, mllm: {world}/{kind}, llm_dtype: fp32, token_grid: 4, fusion_heads: 4, lora_rank: 2"
    return objective_of(config(world, said, *overrides), Alone())


def trained(objective, model, num_steps, lr):
    parameters = [p for of_set in objective.parameter_sets().values() for p in of_set.values()]
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    objective.after_step()
    losses = []
    for batch in islice(objective.batches(0), num_steps):
        optimizer.zero_grad()
        loss = objective.loss(model, batch)
        loss.backward()
        optimizer.step()
        objective.after_step()
        losses.append(float(loss.detach()))
    return losses


def test_segment_looks_at_neither_cache_nor_model_folder_and_learns_masks(world):
    objective = segmenting(world)
    model = objective.build({})
    assert objective.base_digest == NO_BASE
    assert set(objective.parameter_sets()) == objective.sets_of_step(0) == {"unet"}
    with torch.no_grad():
        before = objective.validate(model)
    trained(objective, model, 30, 1e-2)
    with torch.no_grad():
        after = objective.validate(model)
        (picture,) = objective.images(model).values()
    assert set(after) == {"mean", "dice", "cl_dice"}
    assert after["mean"] < 0.95 * before["mean"]
    assert after["dice"] > before["dice"] + 0.1
    num_rows = min(len(objective.samples.entries("val")), 4)
    assert picture.dtype == torch.uint8
    assert picture.shape == (num_rows * SIZE_PX, 3 * SIZE_PX)
    assert objective.first_batch_images()["first_batch/mask_target"].shape == (4 * SIZE_PX, 2 * SIZE_PX)


@pytest.mark.parametrize("kind", KINDS)
def test_diagnose_trains_all_parts_and_tells_parts_gates_and_how_well_groups_are_told_apart(world, kind):
    objective = diagnosing(world, kind)
    model = objective.build({})
    assert objective.sets_of_step(0) == {"unet", "fusion", "llm"}
    losses = trained(objective, model, 6, 1e-3)
    assert min(losses[3:]) < losses[0]
    told = objective.describe()
    assert {"parts/group", "parts/mask", *(f"gate/level_{level}" for level in range(1, 5))} <= set(told)
    assert all(told[f"gate/level_{level}"] for level in range(1, 5))
    assert any(name.startswith("moved/magnitude") for name in told)
    with torch.no_grad():
        found = objective.validate(model)
        pictures = objective.images(model)
    assert set(found) == {"mean", "balanced_accuracy", "macro_auc"}
    picture = pictures["samples/mask_frame_found_level1_level2_level3_level4"]
    assert picture.shape == (min(len(objective.samples.entries("val")), 4) * SIZE_PX, 7 * SIZE_PX)


class Relabelled:
    """Samples of which every one is said to be of another group, in all that is known about it."""

    def __init__(self, samples):
        self.samples = samples

    def triple(self, entry):
        triple = self.samples.triple(entry)
        group = next_group(triple.meta.clinical_group)
        said = prompt_for(group, triple.meta.eye, triple.meta.fields)
        return replace(triple, meta=replace(triple.meta, clinical_group=group, prompt=said, labels={}))


def test_other_labels_leave_all_that_the_model_is_given_as_it_is(world):
    objective = diagnosing(world)
    entries = objective.entries[:6]
    assert len({entry.clinical_group for entry in entries}) > 1
    given = []

    def model(*inputs):
        given.append(inputs)
        return torch.zeros(len(inputs[0]), 3), None, {}

    for source in (objective.source, DiagnosisSource(Relabelled(objective.samples), objective.source._prompts)):
        batch = collated(source, entries) | {"positions": list(range(len(entries))), "step": 0}
        objective.loss(model, batch)
    assert len(given[0]) == 3
    for before, after in zip(*given, strict=True):
        assert torch.equal(before, after)


def test_frames_of_all_groups_that_differ_in_nothing_else_are_asked_the_same(world):
    objective = diagnosing(world)
    asked = {}
    for entry in objective.entries:
        triple = objective.samples.triple(entry)
        codes = (triple.meta.eye, *sorted(triple.meta.fields.items()))
        ids = tuple(objective.source.read(entry)["prompt_ids"].tolist())
        asked.setdefault(codes, set()).add(ids)
        assert len(ids) == len(objective.source.read(objective.entries[0])["prompt_ids"])
    assert all(len(different) == 1 for different in asked.values())


def test_a_group_without_samples_and_a_sample_without_a_group_are_refused_by_name(world):
    entries = list(diagnosing(world).entries)
    without = CachedSamples(entry for entry in entries if entry.clinical_group != "T1NoDPN")
    with pytest.raises(ConfigError, match="no training sample is of group T1NoDPN; add frames of that group"):
        refuse_missing_groups(without)
    entries[2] = replace(entries[2], clinical_group=None)
    with pytest.raises(ConfigError, match=f"of subject {entries[2].subject} has no clinical group; label it"):
        refuse_missing_groups(entries)


@pytest.mark.parametrize(
    ("objective", "problem"),
    [
        ("kind: diagnose, mllm: m, token_grid: 3", "token_grid: 3 does not divide the 4 px of level 4"),
        ("kind: diagnose, mllm: m, fusion_levels: [0], token_grid: 4", r"\[0\] must name levels 1 to 4"),
        ("kind: diagnose, mllm: m, fusion_levels: [2, 2], token_grid: 4", r"\[2, 2\] must name levels 1 to 4"),
        ("kind: diagnose, mllm: m, fusion_levels: [], unet: u, token_grid: 4", "without fusion_levels; set it to null"),
        ("kind: diagnose, mllm: m, llm: full, token_grid: 4", "llm_dtype: bf16 is too coarse for weights"),
        ("kind: diagnose, mllm: m, train_unet: false, token_grid: 4", "the U-Net begins with random weights"),
        ("kind: diagnose, token_grid: 4", "objective.mllm"),
    ],
)
def test_settings_that_do_not_fit_are_refused(world, objective, problem):
    with pytest.raises(ConfigError, match=problem):
        config(world, objective)


def test_a_dry_run_tells_what_is_trained_and_refuses_folders_that_are_not_there(world, tmp_path):
    assert describe(config(world, "kind: segment")).startswith("model: segment from scratch, on pixels\nsamples: ")
    said = describe(config(world, f"kind: diagnose, mllm: {world}/mllama, token_grid: 4, fusion_levels: [1, 2]"))
    named = f"model: language model at {world}/mllama, wdlora of rank 16, reading levels 1, 2 of a U-Net from random"
    assert said.startswith(named)
    bare = describe(
        config(world, f"kind: diagnose, mllm: {world}/mllama, token_grid: 4, fusion_levels: [], llm: frozen")
    )
    assert bare.startswith(f"model: language model at {world}/mllama, frozen, bare\n")
    with pytest.raises(ConfigError, match=f"objective.mllm: {tmp_path}/none is not there; copy it there .* here$"):
        describe(config(world, f"kind: diagnose, mllm: {tmp_path}/none, token_grid: 4"))
    missing = f"objective.unet: {tmp_path}/none is not there; train objective.kind segment first .*; or set it to null"
    with pytest.raises(ConfigError, match=missing):
        describe(config(world, f"kind: diagnose, mllm: {world}/mllama, unet: {tmp_path}/none, token_grid: 4"))
    (tmp_path / "README.md").write_text("Access to this model is restricted.")
    with pytest.raises(ModelError, match=r"holds no config\.json; accept the licence on the model's page"):
        describe(config(world, f"kind: diagnose, mllm: {tmp_path}, token_grid: 4"))
    with pytest.raises(ModelError, match=f"{tmp_path}: holds no network.json; name the folder `network` of a finished"):
        describe(config(world, f"kind: diagnose, mllm: {world}/mllama, unet: {tmp_path}, token_grid: 4"))
    shards = read_manifest(world / "shards").of_split("train")
    triples = (triple for shard in shards for triple in read_shard(world / "shards", shard))
    kept = [("train", triple) for triple in triples if triple.meta.clinical_group != "T1DPN"]
    write_set(tmp_path / "two", "phantom", kept, 16, {})
    with pytest.raises(ConfigError, match="no training sample is of group T1DPN"):
        describe(config(world, f"kind: diagnose, mllm: {world}/mllama, token_grid: 4", f"data.shards={tmp_path}/two"))


def test_networks_that_draw_nothing_are_refused_where_images_are_wanted(world):
    for objective, what in (
        ("kind: segment", "give it as objective.unet"),
        ("kind: diagnose, mllm: m, token_grid: 4", "it tells groups"),
    ):
        settings = config(world, objective).objective
        about = NetworkAbout(settings=settings, image_size_px=SIZE_PX, facts={}, digest="0")
        assert NetworkAbout.model_validate(about.model_dump(mode="json")) == about
        with pytest.raises(ModelError, match=f"which draws no images of masks; {what}"):
            _refuse_network(type("Asked", (), {"network": "n"})(), about)


def test_scores_are_those_of_the_evaluation():
    source = np.random.default_rng(0)
    labels = source.integers(0, 3, 40)
    probabilities = source.dirichlet([1, 1, 1], 40).round(1)  # with ties
    ones = np.ones((1, 40))
    found = group_scores(labels, probabilities)
    assert found["macro_auc"] == pytest.approx(macro_auc(ones, labels, probabilities)[0])
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy(ones, labels, probabilities)[0])
    assert group_scores(np.zeros(3, dtype=int), probabilities[:3]).keys() == {"balanced_accuracy"}


def test_a_picture_of_attention_is_bright_where_the_model_looks():
    attended = torch.zeros(16)
    attended[5] = 1.0
    shown = overlay(torch.full((64, 64), 80, dtype=torch.uint8), attended)
    assert shown[23, 23] > 150
    assert shown[60, 60] == 60
    assert labels_of(list(CLINICAL_GROUPS)).tolist() == [0, 1, 2]
