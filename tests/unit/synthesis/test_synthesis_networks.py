"""Networks from scratch draw the same kind of set as the adapter: planned, shared by workers, verified, with origin."""

import numpy as np
import pytest
import torch
from files_of_sets import contents, images_of

from ccmdist.config.objectives.baselines import MaisiSettings, SpadeSettings
from ccmdist.data.audit import audit_set
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from ccmdist.errors import ConfigError, ModelError, Preempted, RunError
from ccmdist.jobs.synthesize import describe
from ccmdist.models.maisi import latents_digest
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_state import NetworkState, make_network, write_network
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.plan import read_plan
from ccmdist.synthesis.planning import make_network_plan
from ccmdist.synthesis.verify import verify_against_plan

SETTINGS = {
    "spade": SpadeSettings(
        channels=(16, 16), norm_channels=8, noise_dim=8, discriminator_channels=8, discriminator_layers=1
    ),
    "maisi": MaisiSettings(channels=(32, 32), norm_groups=8, num_res_blocks=1, num_attention_levels=1),
}


def network_state(sources, kind, size_px=64, base_digest=None, training_set=None):
    """A network that nobody trained, none of whose weights are zero."""
    network, source = make_network(SETTINGS[kind], size_px, 0), torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02, generator=source)
    found = latents_digest(ModelFolder.open(sources / "model").encoder_identity())
    facts = {
        "base_digest": base_digest or (found if kind == "maisi" else "none"),
        "training_set_digest": training_set or read_manifest(sources / "shards").digest,
        "training_split": "train",
    }
    return NetworkState.of(SETTINGS[kind], size_px, network.state_dict(), facts)


@pytest.fixture(params=["spade", "maisi"])
def state(sources, request):
    return network_state(sources, request.param)


def test_any_number_of_workers_draws_the_same_bytes_and_the_set_is_what_its_plan_asked_for(state, config, tmp_path):
    named = "network=n"
    assert synthesize(config(named, out="alone"), state)
    with pytest.raises(Preempted):
        synthesize(config(named, out="shared"), state, 1, 3, should_stop=iter([False, True]).__next__)
    for worker in (2, 0, 1):
        synthesize(config(named, out="shared"), state, worker, 3)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert "all 10 images" in verify_against_plan(tmp_path / "alone")
    assert "digests only" in audit_set(tmp_path / "alone", read_manifest(tmp_path / "alone")), "or it is never released"


def test_every_image_says_which_network_drew_it_and_the_set_whom_it_has_seen(state, config, sources, tmp_path):
    assert synthesize(config("network=n"), state)
    plan, kind = read_plan(tmp_path / "out"), state.about.kind
    triples = list(read_split(tmp_path / "out", "test"))
    assert len(triples) == 10
    for triple in triples:
        about = triple.meta.provenance
        assert (about["network_kind"], about["network_digest"]) == (kind, state.about.digest)
        assert (about["adapter_digest"], about["base"], about["plan_digest"]) == ("none", "fp32", plan.digest)
        assert (about["denoise_steps"], about["guidance_scale"]) == ((1, 1.0) if kind == "spade" else (2, 3.0))
        assert triple.image.std() > 0
    manifest = read_manifest(tmp_path / "out")
    assert manifest.about["network_digest"] == state.about.digest
    assert manifest.about["training"]["subjects"] == ["s5", "s6"]
    two = [triple.image for triple in triples if triple.meta.provenance["source_key"] == "k0"]
    assert (two[0] != two[1]).any(), "images of one mask differ by their noise"


def test_images_do_not_depend_on_those_beside_them(state, config, tmp_path):
    """But for the order of float additions: at most one grey level of 255, in at most one pixel of a thousand."""
    for size in (1, 2, 5):
        assert synthesize(config("network=n", f"batch_size={size}", out=f"of-{size}"), state)
    alone = images_of(tmp_path / "of-1")
    for size in (2, 5):
        for key, image in images_of(tmp_path / f"of-{size}").items():
            difference = np.abs(image.astype(int) - alone[key])
            assert difference.max() <= 1
            assert (difference > 0).mean() <= 1e-3


def test_a_set_of_another_network_is_another_set(sources, config, tmp_path):
    first = network_state(sources, "spade")
    synthesize(config("network=n", "images_per_mask=1"), first)
    name, tensor = next(iter(first.tensors.items()))
    other = NetworkState.of(first.about.settings, 64, dict(first.tensors) | {name: tensor + 1}, first.about.facts)
    with pytest.raises(RunError, match=r"begun with other settings:\n  network_digest: "):
        synthesize(config("network=n", "images_per_mask=1"), other)
    with pytest.raises(RunError, match="adapter_digest: none -> untuned"):
        synthesize(config("images_per_mask=1"), None)


def test_plans_of_the_edit_model_say_nothing_of_networks(sources, config, plan_of, state):
    settings = plan_of(config()).values()["settings"]
    assert not [name for name in settings if "network" in name]
    about = make_network_plan(config("network=n"), state.about).values()["settings"]
    assert about.keys() == settings.keys() | {"network_kind", "network_digest"}


def test_a_network_of_another_size_or_other_latents_is_refused_and_leaves_no_plan(sources, config, tmp_path):
    with pytest.raises(
        ModelError, match=r"n: draws images of 32 px, data.image_size_px is 64; set data.image_size_px=32"
    ):
        synthesize(config("network=n"), network_state(sources, "spade", size_px=32))
    with pytest.raises(
        ModelError, match=r"n: was trained on latents of the VAE ffffffffffff, .*model holds [0-9a-f]{12}"
    ):
        synthesize(config("network=n"), network_state(sources, "maisi", base_digest="f" * 64))
    assert not (tmp_path / "out").exists()


def test_a_network_is_shown_what_it_was_trained_on_or_is_refused_and_leaves_no_plan(state, config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.structure: points, but n was trained on mask"):
        synthesize(config("network=n", "data.structure=points"), state)
    assert not (tmp_path / "out").exists()


def test_a_flow_takes_two_steps_and_no_noise_of_its_own(sources, config, tmp_path):
    maisi, spade = (network_state(sources, kind) for kind in ("maisi", "spade"))
    with pytest.raises(ConfigError, match="denoise_steps: 1 is too few for a flow; use at least 2"):
        synthesize(config("network=n", "denoise_steps=1"), maisi)
    for state in (maisi, spade):
        with pytest.raises(ConfigError, match=f"eta: 1, but a network of {state.about.kind} draws without noise"):
            synthesize(config("network=n", "eta=1"), state)
    assert not (tmp_path / "out").exists()


def test_spade_needs_neither_cache_nor_model_folder(sources, config, tmp_path):
    nothing = ["data.cache=nowhere", "data.model=nowhere", "images_per_mask=1", "split=train", "data.flips=[hflip]"]
    assert synthesize(config("network=n", *nothing), network_state(sources, "spade", training_set="0" * 64))
    keys = [triple.key for triple in read_split(tmp_path / "out", "train")]
    assert keys == ["k5-0000", "k5-hflip-0000", "k6-0000", "k6-hflip-0000"]
    assert read_manifest(tmp_path / "out").about["training"]["subjects"] is None


def test_a_dry_run_tells_of_the_network_without_torch(state, config, tmp_path):
    write_network(tmp_path / "run" / "network", state)
    for folder in (tmp_path / "run", tmp_path / "run" / "network"):
        told = describe(config(f"network={folder}"))
        assert "10 images of 5 masks in 5 batches and 3 shards; 0 batches are committed" in told
        drawn = "one pass" if state.about.kind == "spade" else "2 denoise steps, guidance 3"
        assert told.endswith(f"model: {state.about.kind} from scratch at {tmp_path}/run/network, {drawn}")
    assert "drawn by the network of a checkpoint in elsewhere" in describe(config("network=elsewhere"))


@pytest.mark.parametrize("other", ["adapter=a", "base=nf4", "compile_blocks=true"])
def test_a_network_draws_alone(other, config):
    with pytest.raises(
        ConfigError, match="network draws without a base model and its adapter; leave out one or the other"
    ):
        config("network=n", other)


def test_an_image_that_is_not_finite_is_refused_by_name(sources, config):
    state = network_state(sources, "maisi")
    tensors = {
        name: torch.full_like(value, 3e38) if name.startswith("out.2") else value
        for name, value in state.tensors.items()
    }
    broken = NetworkState.of(state.about.settings, 64, tensors, state.about.facts)
    with pytest.raises(
        RunError, match=r"images of a batch are not finite \(first: k2-0000\); train it anew with a lower"
    ):
        synthesize(config("network=n"), broken)
