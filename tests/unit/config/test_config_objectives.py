"""What is learnt is chosen by a tag; what would be ignored is refused, and settings of an adapter stay as they were."""

from pathlib import Path

import pytest

from ccmdist.config.loading import digest, load, resolved, validate
from ccmdist.config.train import OF_EDIT, TrainConfig
from ccmdist.errors import ConfigError

CONFIGS = Path(__file__).parents[3] / "configs" / "train"
NEEDED = ["run=r", "data.shards=s", "data.model=m"]


def config(*overrides, files=()):
    return load(TrainConfig, [CONFIGS / f"{name}.yaml" for name in files], overrides)


def test_settings_of_an_adapter_are_written_as_before_there_were_other_objectives():
    assert config(*NEEDED).objective.kind == "edit"
    assert "objective" not in resolved(config(*NEEDED))
    assert digest(config(files=["tiny"])) == "3cc5c1bdcde77c993e1b2512970968c56623f0c6640b4c066f9f248475c50813"


@pytest.mark.parametrize(
    ("kind", "before"),
    [*((kind, before) for kind in ("spade", "maisi") for before in (["wdlora"], ["tiny"])), ("msdm_vae", ["wdlora"])],
)
def test_a_baseline_follows_the_settings_of_the_adapter_and_is_read_back_as_it_was_written(kind, before):
    found = config(files=[*before, kind])
    assert found.objective.kind == kind
    assert not set(OF_EDIT) & resolved(found).keys()
    assert validate(TrainConfig, resolved(found), "a run") == found
    assert digest(found) != digest(
        config("objective.feature_matching=3" if kind == "spade" else "seed=1", files=[*before, kind])
    )


@pytest.mark.parametrize("kind", ["spade", "maisi", "msdm_vae"])
def test_a_small_baseline_has_the_data_of_the_small_adapter(kind):
    assert config(files=["tiny", kind, f"tiny_{kind}"]).data == config(files=["tiny"]).data


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["objective.kind=spade", "adapter.lora_rank=8"],
            "adapter: objective.kind spade adapts no frozen model; leave out",
        ),
        (
            ["objective.kind=maisi", "base=fp32", "tabulate_modulation=false"],
            "base, tabulate_modulation: objective.kind",
        ),
        (
            ["objective.kind=maisi", "sharding=replicated"],
            "sharding: replicated, but objective.kind maisi adapts no frozen",
        ),
        (["objective.kind=spade", "validation.sigmas=[0.5]"], "objective.kind spade has no noise levels; leave out"),
        (
            ["objective.kind=spade", "data.structure=points"],
            "data.structure: points, but objective.kind spade sees the masks themselves; leave out",
        ),
        (["objective.kind=spade", "sigma_sampling=uniform"], "objective.kind spade has no noise levels; leave out"),
        (["objective.kind=spade", "data.image_size_px=336"], "data.image_size_px 336 is not 32 times 2 or more"),
        (
            ["objective.kind=spade", "data.image_size_px=64", "objective.discriminator_layers=3"],
            "the last discriminator has 6 layers, which need images of 256 px (data.image_size_px 64)",
        ),
        (
            ["objective.kind=maisi", "objective.channels=[48]"],
            "norm_groups: 48 channels do not make 32 groups of two or more",
        ),
        (["objective.kind=maisi", "objective.channels=[32]"], "norm_groups: 32 channels do not make 32 groups of two"),
        (["objective.kind=maisi", "objective.channels=[64,96]"], None),
        (
            ["objective.kind=maisi", "data.image_size_px=48"],
            "4 levels halve latents of 6 3 times, which 8 does not divide; use fewer levels, or",
        ),
        (
            ["objective.kind=maisi", "objective.head_channels=48"],
            "head_channels: 256 channels do not divide into heads",
        ),
        (
            ["objective.kind=maisi", "objective.noise_dim=3"],
            "objective.noise_dim: no such field; a field of kind spade",
        ),
        (
            ["objective.kind=msdm_vae", "objective.crop_px=100"],
            "4 levels need an edge that 8 divides; objective.crop_px is 100, the nearest are 96 and 104",
        ),
        (["objective.kind=msdm_vae", "objective.crop_px=512"], "objective.crop_px: 512 is larger than data.image_size"),
        (
            ["objective.kind=msdm_vae", "objective.channels=[20]"],
            "norm_groups: 20 channels do not divide into 8",
        ),
        (["objective.kind=msdm_vae", "objective.mse=0"], "mse, l1: one of them must be above 0"),
        (
            ["objective.kind=msdm", "objective.channels=[32,48]"],
            "norm_groups: 48 channels do not divide into",
        ),
        (["objective.kind=msdm", "objective.heads=3"], "heads: 256 channels do not divide into 3 heads"),
        (["objective.kind=msdm", "objective.beta_start=0.1"], "beta_start 0.1 must not be above beta_end 0.02"),
        (
            ["objective.noise_dim=3"],
            "noise_dim: no such field; a field of kind spade; is a file missing that sets objective.kind?",
        ),
        (
            ["objective.kind=gan"],
            "objective.kind: must be one of 'edit', 'dual', 'spade', 'maisi', 'msdm_vae', 'msdm', "
            "'segment', 'diagnose' (got 'gan')",
        ),
    ],
)
def test_what_does_not_apply_or_fit_is_refused_in_a_sentence(overrides, problem):
    if problem is None:
        assert config(*NEEDED, *overrides)
        return
    with pytest.raises(ConfigError) as refusal:
        config(*NEEDED, *overrides)
    assert problem in str(refusal.value)


def test_mdf_mllm_follows_the_settings_of_segment_and_the_small_one_has_its_unet_and_data():
    assert config(files=["wdlora", "segment"]).objective.channels == (32, 32, 64, 128, 256, 32)
    large = config(files=["wdlora", "segment", "mdf_mllm"])
    assert (large.objective.kind, large.balance) == ("diagnose", "clinical_groups")
    assert large.objective.unet == config(files=["wdlora", "segment"]).run / "network"
    assert validate(TrainConfig, resolved(large), "a run") == large
    unet = config(files=["tiny", "segment", "tiny_segment"])
    small = config(files=["tiny", "segment", "mdf_mllm", "tiny_mdf_mllm"])
    assert small.objective.unet == unet.run / "network"
    assert small.objective.channels == unet.objective.channels
    assert small.data == unet.data == config(files=["tiny"]).data
    bare = config("objective.fusion_levels=[]", "objective.unet=null", files=["wdlora", "segment", "mdf_mllm"])
    assert bare.objective.fusion_levels == ()
