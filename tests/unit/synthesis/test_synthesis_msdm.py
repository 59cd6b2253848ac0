"""MSDM draws the same kind of set as all others: by any number of workers, with noise of each request at every step."""

import numpy as np
import pytest
import torch
from files_of_sets import contents, images_of

from ccmdist.config.data import PrecomputeConfig
from ccmdist.data.audit import audit_set
from ccmdist.data.manifest import read_manifest
from ccmdist.data.reader import read_split
from ccmdist.errors import ConfigError, ModelError, Preempted
from ccmdist.jobs.synthesize import describe
from ccmdist.models.network_state import write_network
from ccmdist.precompute.fill import fill_cache
from ccmdist.synthesis.generate import synthesize
from ccmdist.synthesis.plan import read_plan
from ccmdist.synthesis.requests import Request
from ccmdist.synthesis.sampler import noise_of
from ccmdist.synthesis.verify import verify_against_plan
from tests.small_msdm import UNET, network_state, write_encoders

SIZE_PX = 64


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders") / "network", SIZE_PX)


@pytest.fixture
def config_of(config, encoders):
    """A config of a set that an MSDM draws, whose cache is filled."""

    def config_of(*overrides, out="out"):
        return config("network=n", f"data.model={encoders}", *overrides, out=out)

    fill_cache(PrecomputeConfig(data=config_of().data, splits=("test",)), 0, 1)
    return config_of


@pytest.fixture(scope="module")
def state(sources, encoders):
    return network_state(encoders, SIZE_PX, facts={"training_set_digest": read_manifest(sources / "shards").digest})


@pytest.mark.parametrize("eta", [0, 1])
def test_any_number_of_workers_draws_the_same_bytes_and_the_set_is_what_its_plan_asked_for(
    eta, state, config_of, tmp_path
):
    named = f"eta={eta}"
    assert synthesize(config_of(named, out="alone"), state)
    with pytest.raises(Preempted):
        synthesize(config_of(named, out="shared"), state, 1, 3, should_stop=iter([False, True]).__next__)
    for worker in (0, 2, 1):
        synthesize(config_of(named, out="shared"), state, worker, 3)
    assert contents(tmp_path / "alone") == contents(tmp_path / "shared")
    assert "10 images" in verify_against_plan(tmp_path / "alone")
    assert "digests only" in audit_set(tmp_path / "alone", read_manifest(tmp_path / "alone")), "or it is never released"
    provenance = next(iter(read_split(tmp_path / "alone", "test"))).meta.provenance
    assert provenance["network_kind"] == "msdm"
    assert provenance.get("eta", 0) == eta
    assert ("eta" in read_plan(tmp_path / "alone").settings_values()) == bool(eta), "as before there was an eta"


def test_images_do_not_depend_on_those_beside_them_also_where_noise_is_added_anew(state, config_of, tmp_path):
    """But for the order of float additions: at most one grey level of 255, in at most one pixel of a hundred."""
    for size in (1, 5):
        assert synthesize(config_of("eta=1", f"batch_size={size}", out=f"of-{size}"), state)
    alone = images_of(tmp_path / "of-1")
    for key, image in images_of(tmp_path / "of-5").items():
        difference = np.abs(image.astype(int) - alone[key])
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 1e-2


def test_noise_that_is_added_anew_is_new_at_each_step_and_in_each_request():
    places = [("k0", 0), ("k0", 1), ("k1", 0)]
    requests = [Request(f"{source}-{number:04d}", source, number, "s", "Control") for source, number in places]
    drawn = [noise_of(0, request, (4, 8), step) for request in requests for step in (None, 0, 1, 2)]
    assert len({tuple(noise.flatten().tolist()) for noise in drawn}) == len(drawn)
    assert torch.equal(noise_of(0, requests[1], (4, 8), 1), drawn[6])  # after its first noise and that of step 0


def test_eta_guidance_steps_and_mask_each_change_the_images(state, encoders, config_of, tmp_path, caplog):
    without_mask = network_state(encoders, SIZE_PX, UNET.model_copy(update={"mask_condition": False}))
    for out, one, *overrides in (
        ("usual", state),
        ("noisy", state, "eta=1"),
        ("unguided", state, "guidance_scale=1"),
        ("maskless", without_mask),
        ("one step", state, "denoise_steps=1"),
    ):
        assert synthesize(config_of("images_per_mask=1", *overrides, out=out), one)
    assert [one.getMessage() for one in caplog.records if one.levelname == "WARNING"] == [
        "n: learnt without masks: its images follow the prompt alone"
    ]
    usual = images_of(tmp_path / "usual")
    for other in ("noisy", "unguided", "maskless", "one step"):
        assert any((image != usual[key]).any() for key, image in images_of(tmp_path / other).items()), other
    told = {out: read_manifest(tmp_path / out) for out in ("usual", "maskless")}
    assert "sees_mask" not in told["usual"].about, "as before it was told"
    assert (told["usual"].follows_masks, told["maskless"].follows_masks) == (True, False)


def test_a_dry_run_tells_of_the_network(state, config_of, tmp_path):
    write_network(tmp_path / "network", state)
    for eta, told in ((0, ""), (0.5, ", eta 0.5")):
        expected = f"model: msdm from scratch at {tmp_path}/network, 2 denoise steps, guidance 3{told}"
        assert describe(config_of(f"network={tmp_path}/network", f"eta={eta}")).endswith(expected)


def test_what_cannot_draw_is_refused_and_leaves_no_plan(state, encoders, config, config_of, sources, tmp_path):
    with pytest.raises(ModelError, match=r"of msdm_vae, which draws no images of masks; give it as data\.model"):
        describe(config_of(f"network={encoders}"))
    with pytest.raises(ModelError, match="is a model of Qwen-Image-Edit 2509, expected one of MSDM"):
        synthesize(config("network=n"), state)
    other = network_state(encoders, SIZE_PX, facts={"base_digest": "f" * 64})
    with pytest.raises(ModelError, match=r"was trained on latents of the VAE ffffffffffff, .*holds [0-9a-f]{12}"):
        synthesize(config_of(), other)
    with pytest.raises(
        ConfigError, match="denoise_steps: 1001 are more than the 1000 noise levels of a network of msdm"
    ):
        synthesize(config_of("denoise_steps=1001"), state)
    for act in (describe, lambda settings: synthesize(settings, None)):
        with pytest.raises(
            ModelError, match="MSDM draws with a network that was trained on it, and none is named; add ne"
        ):
            act(config(f"data.model={encoders}"))
    with pytest.raises(ModelError, match="none: there is no such folder; give the folder `network` of a finished run"):
        synthesize(config("network=n", f"data.model={tmp_path}/none"), state)
    with pytest.raises(ConfigError, match="eta: 1, but a frozen model draws without noise of its own; leave out"):
        config("eta=1")
    assert not (tmp_path / "out").exists()
