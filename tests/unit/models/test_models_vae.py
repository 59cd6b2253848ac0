"""On single frames the cheaper VAE is the stock VAE: values, gradients and parameters."""

import copy

import pytest
import torch

from ccmdist.models.make import make_vae
from ccmdist.models.sizes import SIZES
from ccmdist.models.vae import SingleFrameConvolution, denormalised, for_single_frames, normalised


@pytest.fixture(scope="module")
def both():
    """The stock VAE and the same one for single frames, in fp64 so that only real differences show."""
    torch.manual_seed(0)
    stock = make_vae(SIZES["tiny"]).double()
    return stock, for_single_frames(copy.deepcopy(stock))


def test_parameters_keep_their_names_and_values(both):
    stock, single = (model.state_dict() for model in both)
    assert list(stock) == list(single)
    assert all(torch.equal(stock[name], single[name]) for name in stock)


def test_every_causal_convolution_is_replaced(both):
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    kinds = {type(module) for module in both[1].modules() if isinstance(module, QwenImageCausalConv3d)}
    assert kinds == {SingleFrameConvolution}


@pytest.mark.parametrize("shape", [(2, 3, 1, 48, 32), (1, 3, 1, 8, 8)])
def test_values_and_gradients_are_those_of_the_stock_class(both, shape):
    frames = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
    results = []
    for vae in both:
        vae.zero_grad()
        given = frames.clone().requires_grad_()
        latents = vae.encode(given).latent_dist.mode()
        drawn = vae.decode(latents).sample
        drawn.clamp(-0.9, 0.9).square().sum().backward()
        gradients = {name: p.grad for name, p in vae.named_parameters() if p.grad is not None}
        results.append((latents.detach(), drawn.detach(), given.grad, gradients))
    (latents, drawn, by_input, gradients), (latents_1, drawn_1, by_input_1, gradients_1) = results
    torch.testing.assert_close(latents_1, latents, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(drawn_1, drawn, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(by_input_1, by_input, rtol=1e-7, atol=1e-10)
    assert gradients.keys() == gradients_1.keys()
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients.values())
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_1[name], gradient, rtol=1e-7, atol=1e-9, msg=name)


def test_a_film_is_refused_instead_of_being_drawn_wrongly(both):
    with pytest.raises(AssertionError, match="single frames only, got 4"):
        both[1].encode(torch.zeros(1, 3, 5, 16, 16, dtype=torch.float64))


def test_normalised_latents_have_the_statistics_taken_out_per_channel():
    size = SIZES["tiny"]
    vae = make_vae(size)
    vae.register_to_config(latents_mean=[float(c) for c in range(16)], latents_std=[2.0 + c for c in range(16)])
    channel = torch.arange(16.0).view(1, 16, 1, 1)
    latents = channel + (2 + channel) * torch.randn(2, 16, 3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(normalised(latents, vae) * (2 + channel) + channel, latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(denormalised(normalised(latents, vae), vae), latents, rtol=1e-5, atol=1e-5)
    films = latents.unsqueeze(2)
    assert torch.equal(normalised(films, vae).squeeze(2), normalised(latents, vae))
    assert normalised(latents.bfloat16(), vae).dtype == torch.bfloat16
