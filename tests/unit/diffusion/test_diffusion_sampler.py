"""Our batched sampler against the stock pipeline, one image at a time, on the tiny stack of the same classes."""

import numpy as np
import pytest
import torch
from diffusers import QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as stock
from PIL import Image

from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import Known, guided, sample
from ccmdist.models import mmdit
from ccmdist.models.encoders import LatentCodec
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.sampling import GuidedVelocity

NUM_DENOISE_STEPS = 3
TARGET_PX = 64
BATCH, TEXT_LENGTH, NEGATIVE_LENGTH, TEXT_WIDTH = 2, 11, 7, 64


@pytest.fixture(scope="module", params=["2509", "2511"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / request.param
    make_model("tiny", request.param, path, seed=0)
    return ModelFolder.open(path)


@pytest.fixture(scope="module")
def pipeline(folder):
    """The stock pipeline without encoder of prompts, whose embeddings are handed over."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "processor"))
    loaded = QwenImageEditPlusPipeline.from_pretrained(str(folder.path), torch_dtype=torch.float32, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.transformer.config.zero_cond_t == (folder.version == "2511")
    return loaded


@pytest.fixture(scope="module")
def inputs():
    source = torch.Generator().manual_seed(1)
    num_tokens = (TARGET_PX // 16) ** 2
    return {
        "noise": torch.randn(BATCH, num_tokens, 64, generator=source),
        "prompt_embeds": torch.randn(BATCH, TEXT_LENGTH, TEXT_WIDTH, generator=source),
        "negative_prompt_embeds": torch.randn(BATCH, NEGATIVE_LENGTH, TEXT_WIDTH, generator=source),
    }


def nerve_masks(size_px):
    return np.random.default_rng(0).random((BATCH, size_px, size_px)) > 0.9


def stock_images(pipeline, inputs, masks_BHW, guidance_scale, output_type):
    """One image at a time, as the stock pipeline demands."""
    negative = inputs["negative_prompt_embeds"] if guidance_scale > 1 else [None] * BATCH
    images = []
    for index in range(BATCH):
        result = pipeline(
            image=[Image.fromarray(masks_BHW[index].astype(np.uint8) * 255).convert("RGB")],
            prompt_embeds=inputs["prompt_embeds"][index : index + 1],
            negative_prompt_embeds=None if negative[index] is None else negative[index : index + 1],
            latents=inputs["noise"][index : index + 1],
            height=TARGET_PX,
            width=TARGET_PX,
            num_inference_steps=NUM_DENOISE_STEPS,
            true_cfg_scale=guidance_scale,
            output_type=output_type,
        )
        images.append(result.images[0])
    return torch.stack(images)


def our_latents(folder, inputs, masks_BHW, guidance_scale):
    """All images at once, packed."""
    model = mmdit.build(folder, torch.float32, None)
    codec = LatentCodec.load(folder, torch.float32, "cpu")
    mask_latents = codec.encode(masks_BHW.astype(np.uint8) * 255)
    edge, mask_edge = TARGET_PX // 16, masks_BHW.shape[1] // 16

    embeds = [inputs["prompt_embeds"], inputs["negative_prompt_embeds"]][: 2 if guidance_scale > 1 else 1]
    packed = flow.pack_latents(mask_latents)
    velocity = GuidedVelocity(model, packed, embeds, (edge, edge), (mask_edge, mask_edge))
    noise_schedule = folder.noise_schedule()
    shift = flow.resolution_shift(edge * edge, noise_schedule)
    sigmas = flow.sampling_sigmas(NUM_DENOISE_STEPS, shift, noise_schedule)
    return sample(velocity, inputs["noise"], sigmas, guidance_scale), codec


@pytest.mark.parametrize(("mask_px", "guidance_scale"), [(64, 3.0), (96, 3.0), (64, 1.0)])
def test_a_batch_equals_the_stock_pipeline_image_by_image(
    folder, pipeline, inputs, mask_px, guidance_scale, monkeypatch
):
    # The pipeline always enlarges its condition image to about a megapixel; here to the size that ours has.
    monkeypatch.setattr(stock, "VAE_IMAGE_SIZE", mask_px * mask_px)
    masks_BHW = nerve_masks(mask_px)
    found, codec = our_latents(folder, inputs, masks_BHW, guidance_scale)
    expected = stock_images(pipeline, inputs, masks_BHW, guidance_scale, "latent")
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    images = stock_images(pipeline, inputs, masks_BHW, guidance_scale, "pt").mean(dim=1) * 255
    decoded = codec.decode(flow.unpack_latents(found, TARGET_PX // 8, TARGET_PX // 8))
    # Rounded to whole grey levels, after a mean of channels that the pipeline clips one by one and ours does not.
    assert np.abs(decoded - images.numpy()).max() < 0.51


def test_guidance_keeps_the_norm_of_the_conditional_prediction():
    conditional, unconditional = torch.randn(2, 3, 5, 64)
    combined = unconditional + 4 * (conditional - unconditional)
    expected = combined * (torch.norm(conditional, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))
    found = guided(conditional, unconditional, 4.0)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), conditional.norm(dim=-1), rtol=1e-5, atol=1e-5)


def test_a_token_without_any_prediction_stays_finite():
    nothing = torch.zeros(1, 2, 4)
    assert torch.equal(guided(nothing, nothing, 4.0), nothing)


def test_the_exact_velocity_leads_from_noise_to_the_image():
    x_BSC, noise_BSC = torch.randn(2, 2, 4, 64)
    sigmas = flow.sampling_sigmas(5, 0.6, {"shift_terminal": 0.02})
    found = sample(lambda latents, sigma_B: (noise_BSC - x_BSC,), noise_BSC, sigmas, 1.0)
    torch.testing.assert_close(found, x_BSC, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("guidance_scale", "given", "expected"), [(1.0, 2, 1), (2.5, 1, 2)])
def test_a_prediction_too_few_or_too_many_is_not_passed_over(guidance_scale, given, expected):
    def velocity(latents_BSC, sigma_B):
        assert sigma_B.shape == (2,)
        return (torch.ones_like(latents_BSC),) * given

    with pytest.raises(AssertionError, match=f"guidance {guidance_scale} needs {expected} predictions, got {given}"):
        sample(velocity, torch.randn(2, 4, 64), flow.sampling_sigmas(4, 0.6, {}), guidance_scale)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_what_is_known_is_seen_at_every_noise_level_and_is_there_at_the_end(guidance_scale):
    x_BSC, noise_BSC = torch.randn(2, 2, 6, 64)
    is_open_BS = torch.tensor([[True] * 6, [True, False, False, True, False, True]])
    sigmas, seen = flow.sampling_sigmas(5, 0.6, {"shift_terminal": 0.02}), []

    def velocity(latents_BSC, sigma_B):
        seen.append((latents_BSC, sigma_B))
        return (torch.tanh(latents_BSC), torch.sin(latents_BSC))[: 1 + (guidance_scale > 1)]

    found = sample(velocity, noise_BSC, sigmas, guidance_scale, Known(x_BSC, is_open_BS))
    assert [float(sigma_B[0]) for _, sigma_B in seen] == sigmas[:-1].tolist()
    for latents_BSC, sigma_B in seen:
        at_level = flow.interpolate(x_BSC, noise_BSC, sigma_B)
        assert torch.equal(latents_BSC[~is_open_BS], at_level[~is_open_BS])
    assert torch.equal(found[~is_open_BS], x_BSC[~is_open_BS])
    free = sample(velocity, noise_BSC, sigmas, guidance_scale)
    assert torch.equal(found[0], free[0]), "all of it was open, and so it is drawn as without anything known"
    assert torch.equal(found[is_open_BS], free[is_open_BS]), "this velocity looks at one token at a time"
    assert not torch.equal(found[1], free[1])


def test_the_exact_velocity_fills_a_hole_with_the_image():
    x_BSC, noise_BSC = torch.randn(2, 2, 4, 64)
    is_open_BS = torch.tensor([[True, False, True, False], [False, True, True, True]])
    holed_BSC = torch.where(is_open_BS.unsqueeze(-1), 0, x_BSC)
    sigmas = flow.sampling_sigmas(5, 0.6, {"shift_terminal": 0.02})
    found = sample(lambda *_: (noise_BSC - x_BSC,), noise_BSC, sigmas, 1.0, Known(holed_BSC, is_open_BS))
    torch.testing.assert_close(found, x_BSC, rtol=0, atol=1e-5)
