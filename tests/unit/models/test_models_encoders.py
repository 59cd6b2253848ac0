"""Our calls of the encoders give what the encoders can give: 3-D positions, unpadded embeddings, grey frames."""

import importlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ccmdist.errors import ModelError
from ccmdist.models.encoders import LatentCodec, PromptEncoder, grey_of_rgb, rgb_of_grey
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.sizes import PIPELINES
from ccmdist.models.template import NUM_DROPPED_TOKENS, encoder_text

VERSIONS = ["v1", "2509", "2511"]
PROMPT = "Turn this nerve mask into a corneal confocal microscopy image"


def nerve_mask(seed=0, height=96, width=96):
    source = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for start in source.integers(4, height - 8, 5):
        mask[start : start + 3, source.integers(0, width // 2) :] = 255
    return mask


@pytest.fixture(scope="module")
def prompt_encoders(tiny_models):
    """Version -> encoder in fp32."""
    return {v: PromptEncoder.load(ModelFolder.open(tiny_models[v]), torch.float32, "cpu") for v in VERSIONS}


def processed(encoder, prompt, mask):
    """What the processor gives for one sample, as the stock pipelines ask it."""
    text, image = encoder_text(prompt, encoder.version), encoder.condition_image(mask)
    return dict(encoder.processor(text=[text], images=[image], padding=True, return_tensors="pt"))


@torch.no_grad()
def last_states(encoder, inputs):
    return encoder.encoder(**inputs, output_hidden_states=True).hidden_states[-1][0, NUM_DROPPED_TOKENS:]


@pytest.mark.parametrize("version", VERSIONS)
def test_embeddings_are_those_of_the_encoder_given_all_that_the_processor_made(prompt_encoders, version):
    encoder, mask = prompt_encoders[version], nerve_mask()
    inputs = processed(encoder, PROMPT, mask)
    assert set(inputs) == {"input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw"}
    assert torch.equal(encoder.encode([PROMPT], [mask])[0], last_states(encoder, inputs))


@pytest.mark.parametrize("version", VERSIONS)
def test_without_token_types_the_encoder_would_fall_back_to_other_positions(prompt_encoders, version):
    encoder, mask = prompt_encoders[version], nerve_mask()
    inputs = processed(encoder, PROMPT, mask)
    del inputs["mm_token_type_ids"]
    embeddings = encoder.encode([PROMPT], [mask])[0]
    difference = (embeddings - last_states(encoder, inputs)).norm() / embeddings.norm()
    assert difference > 1e-4, "the encoder no longer needs mm_token_type_ids, or our call lost them"


def stock_pipeline(encoder):
    """The stock pipeline of the version around our encoder and processor."""
    import diffusers

    parts = dict.fromkeys(("scheduler", "vae", "transformer"))
    kind = getattr(diffusers, PIPELINES[encoder.version])
    return kind(
        **parts, text_encoder=encoder.encoder, tokenizer=encoder.processor.tokenizer, processor=encoder.processor
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_the_stock_pipeline_differs_by_the_missing_token_types_alone(prompt_encoders, version):
    encoder, mask = prompt_encoders[version], nerve_mask()
    ours, image = encoder.encode([PROMPT], [mask])[0], encoder.condition_image(mask)
    types, seen = processed(encoder, PROMPT, mask)["mm_token_type_ids"], []

    def complete(module, args, inputs):
        seen.append(set(inputs))
        return args, {**inputs, "mm_token_type_ids": types}

    pipeline = stock_pipeline(encoder)
    with torch.no_grad():
        stock, _ = pipeline._get_qwen_prompt_embeds(PROMPT, [image])
        hook = encoder.encoder.register_forward_pre_hook(complete, with_kwargs=True)
        completed, _ = pipeline._get_qwen_prompt_embeds(PROMPT, [image])
        hook.remove()
    assert "mm_token_type_ids" not in seen[0]
    assert torch.equal(completed[0], ours)
    assert not torch.allclose(stock[0], ours, atol=1e-4)


@pytest.mark.parametrize("version", VERSIONS)
def test_samples_encoded_together_equal_those_encoded_one_by_one(prompt_encoders, version):
    encoder = prompt_encoders[version]
    prompts = [PROMPT, PROMPT + " with every nerve where the mask shows it", " "]
    masks = [nerve_mask(0), nerve_mask(1, 64, 128), nerve_mask(2)]
    together = encoder.encode(prompts, masks)
    for embeddings, prompt, mask in zip(together, prompts, masks, strict=True):
        alone = encoder.encode([prompt], [mask])[0]
        torch.testing.assert_close(embeddings, alone, rtol=0, atol=1e-5)
    assert len({len(embeddings) for embeddings in together}) == 3, "nothing is padded"


def test_a_picture_of_equal_channels_is_the_grey_one_bit_for_bit_and_colours_count(prompt_encoders, tiny_models):
    encoder, grey = prompt_encoders["2509"], nerve_mask()
    rgb = np.repeat(grey[..., None], 3, axis=2)
    coloured = np.where(rgb > 0, np.array([255, 64, 0], np.uint8), rgb)
    same, other = encoder.encode([PROMPT] * 2, [rgb, coloured])
    assert torch.equal(same, encoder.encode([PROMPT] * 2, [grey, coloured])[0])
    assert (same - other).abs().max() > 1e-3
    codec = LatentCodec.load(ModelFolder.open(tiny_models["2509"]), torch.float32, "cpu")
    latents = codec.encode(grey[None])
    assert torch.equal(codec.encode(rgb[None]), latents)
    assert (codec.encode(coloured[None]) - latents).abs().max() > 1e-3


def test_the_mask_and_the_prompt_both_reach_the_embeddings(prompt_encoders):
    encoder = prompt_encoders["2509"]
    first, other_mask, other_prompt = encoder.encode(
        [PROMPT, PROMPT, PROMPT.replace("nerve", "image")], [nerve_mask(0), nerve_mask(1), nerve_mask(0)]
    )
    assert (first - other_mask).abs().max() > 1e-3
    assert (first - other_prompt).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("version", "shape", "size"),
    [
        ("v1", (384, 384), (1024, 1024)),
        ("2509", (384, 384), (384, 384)),
        ("2511", (96, 96), (384, 384)),
        ("2511", (96, 192), (544, 256)),
        ("v1", (300, 200), (832, 1248)),
    ],
)
def test_the_condition_image_has_the_area_of_the_version_and_is_scaled_as_the_pipeline_scales(
    prompt_encoders, version, shape, size
):
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    mask = nerve_mask(0, *shape)
    image = prompt_encoders[version].condition_image(mask)
    assert (image.mode, image.size) == ("RGB", size)
    file = "edit" if version == "v1" else "edit_plus"
    pipelines = importlib.import_module(f"diffusers.pipelines.qwenimage.pipeline_qwenimage_{file}")
    area = 1024 * 1024 if version == "v1" else pipelines.CONDITION_IMAGE_SIZE
    width, height, *_ = pipelines.calculate_dimensions(area, shape[1] / shape[0])
    stock = VaeImageProcessor().resize(Image.fromarray(mask).convert("RGB"), height, width)
    assert np.array_equal(np.asarray(stock), np.asarray(image))


def test_a_tokenizer_that_does_not_fit_the_template_is_refused(tiny_copy):
    file = tiny_copy / "tokenizer/tokenizer.json"
    values = json.loads(file.read_text())
    values["model"]["merges"] = values["model"]["merges"][:20]
    file.write_text(json.dumps(values))
    message = (
        r"model/tokenizer: the prefix of the template takes \d+ tokens, expected 64; use the tokenizer that belongs"
    )
    with pytest.raises(ModelError, match=message):
        PromptEncoder.load(ModelFolder.open(tiny_copy), torch.float32, "cpu")


@pytest.mark.parametrize("problem", ["missing", "mismatched"])
def test_weights_that_do_not_fit_the_encoder_are_refused_not_drawn_anew(tiny_copy, problem):
    file = tiny_copy / "text_encoder/model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensor = tensors.pop(name)
    if problem == "mismatched":
        tensors[name] = tensor[1:].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        PromptEncoder.load(ModelFolder.open(tiny_copy), torch.float32, "cpu")
    assert f"text_encoder: {problem} weights, such as " in str(error.value)
    assert "layers.1.mlp.up_proj.weight" in str(error.value)
    assert str(error.value).endswith("use config.json and weights of the same checkpoint")


def set_statistics(folder):
    """Statistics per channel, as the published VAE has them; those of the tiny one are 0 and 1."""
    file = folder / "vae/config.json"
    statistics = {"latents_mean": [0.1 * c - 0.5 for c in range(16)], "latents_std": [1 + 0.2 * c for c in range(16)]}
    file.write_text(json.dumps(json.loads(file.read_text()) | statistics))
    return [torch.tensor(values).view(1, 16, 1, 1, 1) for values in statistics.values()]


@torch.no_grad()
def test_frames_become_the_latents_of_the_stock_vae_and_come_back_as_it_draws_them(tiny_copy):
    from diffusers import AutoencoderKLQwenImage

    mean, std = set_statistics(tiny_copy)
    codec = LatentCodec.load(ModelFolder.open(tiny_copy), torch.float32, "cpu")
    stock = AutoencoderKLQwenImage.from_pretrained(tiny_copy / "vae", torch_dtype=torch.float32).eval()
    frames = np.random.default_rng(0).integers(0, 256, (3, 64, 48), dtype=np.uint8)
    rgb = torch.from_numpy(np.stack([frames] * 3, 1)).float()[:, :, None] / 127.5 - 1
    expected = (stock.encode(rgb).latent_dist.mode() - mean) / std
    latents = codec.encode(frames)
    assert latents.shape == (3, 16, 8, 6)
    torch.testing.assert_close(latents, expected[:, :, 0], rtol=1e-5, atol=1e-5)
    drawn = stock.decode(expected * std + mean).sample[:, :, 0].clamp(-1, 1)
    grey = ((drawn.mean(1) + 1) * 127.5).numpy()
    assert np.abs(codec.decode(latents) - grey).max() <= 0.5 + 1e-2, "nearest grey value"


def test_a_frame_is_encoded_alike_alone_and_among_others(tiny_models):
    codec = LatentCodec.load(ModelFolder.open(tiny_models["2509"]), torch.float32, "cpu")
    frames = np.random.default_rng(1).integers(0, 256, (4, 32, 32), dtype=np.uint8)
    together = codec.encode(frames)
    for index in range(4):
        torch.testing.assert_close(codec.encode(frames[index : index + 1])[0], together[index], rtol=0, atol=1e-5)


def test_every_grey_value_comes_back_from_its_three_channels():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    rgb = rgb_of_grey(grey)
    assert rgb.shape == (1, 3, 16, 16)
    assert torch.equal(rgb[:, 0], rgb[:, 1])
    assert torch.equal(rgb[:, 0], rgb[:, 2])
    assert (float(rgb.min()), float(rgb.max())) == (-1.0, 1.0)
    assert torch.equal(grey_of_rgb(rgb), grey)


def test_three_channels_that_differ_become_their_mean_within_the_range():
    rgb = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 2.0, 2.0], [-3.0, -3.0, -3.0]]).view(3, 3, 1, 1)
    assert grey_of_rgb(rgb).flatten().tolist() == [128, 255, 0]


def test_vae_weights_of_another_checkpoint_are_refused(tiny_copy, tmp_path):
    from ccmdist.models.make import make_model

    make_model("small", "2509", tmp_path / "small")
    shutil.copy(tmp_path / "small/vae/config.json", tiny_copy / "vae/config.json")
    message = "the weights do not fit AutoencoderKLQwenImage: "
    with pytest.raises(ModelError, match=re.escape(message)) as error:
        LatentCodec.load(ModelFolder.open(tiny_copy), torch.float32, "cpu")
    assert str(error.value).endswith("use config.json and weights of the same checkpoint")
