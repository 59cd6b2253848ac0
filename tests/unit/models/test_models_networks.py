"""The networks of the baselines: what they are told, how they are judged, and how they are kept."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.objectives.baselines import MaisiSettings, SpadeSettings
from ccmdist.errors import ModelError
from ccmdist.models import maisi, spade
from ccmdist.models.network_folder import ABOUT_FILE, NETWORK_FILE
from ccmdist.models.network_state import NetworkState, make_network, read_network, write_network

SPADE = SpadeSettings(channels=(16, 16), norm_channels=8, noise_dim=8, discriminator_channels=8, discriminator_layers=1)
MAISI = MaisiSettings(channels=(32, 32), norm_groups=8, num_res_blocks=1, num_attention_levels=1)
SIZE_PX = 32
GROUPS = ("T1DPN", None, "Control")


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", [SPADE, MAISI])
def test_weights_depend_on_the_seed_alone_and_are_all_that_a_checkpoint_has_to_keep(settings):
    networks = [make_network(settings, SIZE_PX, seed) for seed in (3, 3, 4)]
    if settings is SPADE:
        networks += [spade.make_discriminators(SPADE, SIZE_PX, 3)]
    first, again, other = (dict(network.named_parameters()) for network in networks[:3])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not [name for network in networks for name, _ in network.named_buffers()]


def test_a_label_map_has_background_nerve_and_one_channel_for_each_group():
    nerve_mask_BHW = random(3, 4, 5) > 0
    labels_BKHW = spade.label_map(nerve_mask_BHW, GROUPS)
    assert labels_BKHW.shape == (3, 2 + len(CLINICAL_GROUPS), 4, 5)
    assert torch.equal(labels_BKHW[:, 1].bool(), nerve_mask_BHW)
    assert torch.equal(labels_BKHW[:, 0].bool(), ~nerve_mask_BHW)
    given = [[float(group == known) for known in CLINICAL_GROUPS] for group in GROUPS]
    assert labels_BKHW[:, 2:].amin(dim=(2, 3)).tolist() == labels_BKHW[:, 2:].amax(dim=(2, 3)).tolist() == given


def test_an_image_of_spade_depends_on_mask_group_and_noise_but_not_on_images_beside_it():
    network, noise_BZ = make_network(SPADE, SIZE_PX, 0), random(3, 8)
    labels_BKHW = spade.label_map(random(3, SIZE_PX, SIZE_PX) > 1, ["Control"] * 3)
    with torch.no_grad():
        images = network(labels_BKHW, noise_BZ)
        alone = network(labels_BKHW[1:2], noise_BZ[1:2])
        others = [
            network(labels_BKHW[2:], noise_BZ[1:2]),
            network(labels_BKHW[1:2], noise_BZ[2:]),
            network(spade.label_map(labels_BKHW[1:2, 1] > 0, ["T1DPN"]), noise_BZ[1:2]),
        ]
    assert images.shape == (3, 1, SIZE_PX, SIZE_PX)
    torch.testing.assert_close(images[1:2], alone, rtol=0, atol=1e-5)
    assert all((other - alone).abs().max() > 1e-3 for other in others)


def test_losses_of_the_gan_are_those_of_the_papers():
    real, drawn = [torch.tensor([2.0, 0.5])], [torch.tensor([-3.0, 0.0])]
    assert float(spade.discriminator_loss(real, drawn)) == pytest.approx((0.25 + 0.5) / 2)
    assert float(spade.generator_loss(drawn)) == pytest.approx(1.5)
    features = [[torch.tensor([1.0, 2.0]), torch.tensor([0.0])]], [[torch.tensor([1.5, 2.0]), torch.tensor([4.0])]]
    assert float(spade.feature_distance(*features)) == pytest.approx((0.25 + 4) / 2)
    # Beyond the corner nothing is gained: MONAI's hinge, on tanh of the scores, never gets there.
    assert float(spade.discriminator_loss([torch.tensor([5.0])], [torch.tensor([-5.0])])) == 0


def test_what_is_judged_at_once_is_judged_as_if_apart():
    judging = spade.make_discriminators(SPADE, SIZE_PX, 0)
    images, labels = random(4, 1, SIZE_PX, SIZE_PX), random(4, spade.NUM_LABELS, SIZE_PX, SIZE_PX, seed=1)
    with torch.no_grad():
        (real, real_features), (drawn, _) = spade.halves(*spade.judged(judging, images, labels))
        expected, features = spade.judged(judging, images[:2], labels[:2])
    assert len(real) == len(drawn) == SPADE.num_discriminators
    for found, wanted in zip(real, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert [[layer.shape for layer in one] for one in real_features] == [[f.shape for f in one] for one in features]


def test_maisi_is_told_noise_level_mask_group_and_size_of_a_pixel():
    network = make_network(MAISI, SIZE_PX, 0)
    for parameter in network.parameters():
        if not parameter.any():  # where every block begins with, so that nothing is seen of its conditions
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    latents, mask, um_per_px, sigma = random(2, 16, 4, 4), random(2, 16, 4, 4, seed=1), torch.ones(2), torch.ones(2) / 2
    groups = maisi.classes(GROUPS)
    assert groups.tolist() == [2, maisi.NULL_CLASS, 0]
    with torch.no_grad():
        told = maisi.velocity(network, latents, mask, groups[:2], um_per_px, sigma)
        alone = maisi.velocity(network, latents[:1], mask[:1], groups[:1], um_per_px[:1], sigma[:1])
        others = [
            maisi.velocity(network, latents, mask.flip(0), groups[:2], um_per_px, sigma),
            maisi.velocity(network, latents, mask, groups[1:], um_per_px, sigma),
            maisi.velocity(network, latents, mask, groups[:2], 2 * um_per_px, sigma),
            maisi.velocity(network, latents, mask, groups[:2], um_per_px, sigma / 2),
        ]
    assert told.shape == latents.shape
    torch.testing.assert_close(told[:1], alone, rtol=0, atol=1e-5)
    assert all((other - told)[0].abs().max() > 1e-4 for other in others)


@pytest.fixture(params=[SPADE, MAISI])
def state(request):
    tensors = make_network(request.param, SIZE_PX, 5).state_dict()
    return NetworkState.of(request.param, SIZE_PX, tensors, {"training_split": "train"})


def test_a_network_is_read_back_as_it_was_written(state, tmp_path):
    write_network(tmp_path, state)
    found = read_network(tmp_path)
    assert found.about == state.about
    network = found.network(torch.device("cpu"))
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, state.tensors[name]) for name, value in network.state_dict().items())


def test_the_digest_covers_settings_size_and_weights_and_not_where_it_comes_from(state):
    settings, tensors = state.about.settings, dict(state.tensors)
    name = next(iter(tensors))
    others = [
        NetworkState.of(settings.model_copy(update={"channels": (64, 64)}), SIZE_PX, tensors, {}),
        NetworkState.of(settings, 2 * SIZE_PX, tensors, {}),
        NetworkState.of(settings, SIZE_PX, tensors | {name: tensors[name] + 1}, {}),
    ]
    assert len({one.about.digest for one in [state, *others]}) == 4
    assert NetworkState.of(settings, SIZE_PX, tensors, {}).about.digest == state.about.digest


def test_what_is_not_a_network_of_ours_is_refused(state, tmp_path):
    with pytest.raises(ModelError, match=r"network\.json: No such file or directory; give the folder `network`"):
        read_network(tmp_path)
    write_network(tmp_path, state)
    about = json.loads((tmp_path / ABOUT_FILE).read_text())
    for change, problem in (
        ({"format": "other"}, r"is not the description of a network \(format: Input should be 'ccmdist network'"),
        ({"settings": {"kind": "stylegan"}}, r"is not the description of a network \(settings: "),
        ({"code": "import os"}, r"\(code: Extra inputs are not permitted\)"),
        ({"digest": "0" * 64}, r"network\.safetensors: is [0-9a-f]{12}, its description names 000000000000"),
    ):
        (tmp_path / ABOUT_FILE).write_text(json.dumps(about | change))
        with pytest.raises(ModelError, match=problem):
            read_network(tmp_path)
    (tmp_path / ABOUT_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        read_network(tmp_path)
    (tmp_path / ABOUT_FILE).write_text(json.dumps(about))
    (tmp_path / NETWORK_FILE).write_bytes((tmp_path / NETWORK_FILE).read_bytes()[:-1])
    with pytest.raises(ModelError, match="is not a complete safetensors file"):
        read_network(tmp_path)
    (tmp_path / NETWORK_FILE).unlink()
    with pytest.raises(ModelError, match=r"network\.safetensors: is missing"):
        read_network(tmp_path)


def test_weights_that_do_not_fit_their_settings_are_refused(state, tmp_path):
    write_network(tmp_path, state)
    tensors = load_file(tmp_path / NETWORK_FILE)
    tensors.pop(min(tensors))
    save_file(tensors, tmp_path / NETWORK_FILE)
    broken = NetworkState.of(state.about.settings, SIZE_PX, tensors, {})
    with pytest.raises(ModelError, match="does not fit its settings"):
        broken.network(torch.device("cpu"))
