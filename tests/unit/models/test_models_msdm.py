"""The frozen half of an MSDM as a folder: complete or refused, and called as stock pipelines call it."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.encoder_choice import load_encoders
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.msdm import MsdmCodec, make_vae, measured_scaling
from tests.small_msdm import SETTINGS, make_small_msdm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_small_msdm(tmp_path_factory.mktemp("msdm") / "network")


def pictures(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_weights_depend_on_the_seed_alone_and_are_all_that_a_checkpoint_has_to_keep():
    first, again, other = (make_vae(SETTINGS, seed) for seed in (3, 3, 4))
    states = [dict(vae.named_parameters()) for vae in (first, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert not list(first.buffers())


def test_the_folder_is_that_of_an_msdm_and_stock_diffusers_opens_its_vae(folder):
    assert (folder.kind, folder.title) == ("msdm", "MSDM")
    vae = AutoencoderKL.from_pretrained(folder.path, subfolder="vae", local_files_only=True)
    assert vae.config.scaling_factor == 2.0
    codec = MsdmCodec.load(folder, torch.float32, "cpu")
    expected = make_vae(SETTINGS, 0).state_dict()
    for found in (vae.state_dict(), codec.vae.state_dict()):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_latents_of_images_are_scaled_and_those_of_masks_are_as_the_stock_pipeline_makes_them(folder):
    """It divides by 255 where we do by 127.5, so last bits may differ."""
    from diffusers import StableDiffusionInstructPix2PixPipeline
    from diffusers.image_processor import VaeImageProcessor

    codec, mask = MsdmCodec.load(folder, torch.float32, "cpu"), pictures(32, 32) // 128 * 255
    pipe = StableDiffusionInstructPix2PixPipeline(
        codec.vae, None, None, None, None, None, None, requires_safety_checker=False
    )
    given = VaeImageProcessor(vae_scale_factor=codec.factor).preprocess(Image.fromarray(mask).convert("RGB"))
    expected = pipe.prepare_image_latents(given, 1, 1, torch.float32, "cpu", False)
    structure = codec.encode_structure(mask[None])
    assert structure.shape == (1, 4, 8, 8)
    torch.testing.assert_close(structure, expected, rtol=0, atol=1e-6)
    assert torch.equal(codec.encode(mask[None]), 2 * structure)
    assert np.array_equal(codec.decode(2 * structure), codec.decode_structure(structure))


def test_a_picture_with_three_equal_colours_is_a_grey_one(folder):
    codec, grey = MsdmCodec.load(folder, torch.float32, "cpu"), pictures(2, 32, 32)
    assert torch.equal(codec.encode_structure(grey), codec.encode_structure(np.stack([grey] * 3, axis=-1)))


def test_measured_scaling_brings_latents_to_a_deviation_of_one():
    vae, images = make_vae(SETTINGS, 0), pictures(5, 32, 32)
    factor = measured_scaling(vae, images)
    latents = torch.cat([MsdmCodec(make_vae(SETTINGS, 0, factor)).encode(image[None]) for image in images])
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_images_that_the_vae_does_not_divide_are_refused(folder):
    codec = MsdmCodec.load(folder, torch.float32, "cpu")
    with pytest.raises(ConfigError, match=r"divides edges by 4, 34 px do not divide; set it to 32 or 36"):
        codec.encode(pictures(1, 34, 34))


def test_the_identity_is_that_of_all_that_decides_what_is_cached(folder, tmp_path):
    before = folder.encoder_identity()
    assert make_small_msdm(tmp_path / "again").encoder_identity() == before, "every export is the same"

    def changed(**changes):
        name = "-".join(map(str, changes.values()))
        after = make_small_msdm(tmp_path / name, **changes).encoder_identity()
        return {field for field in before if before[field] != after[field]}

    assert changed(seed=1) == {"vae_weights"}
    assert changed(scaling_factor=3.0) == {"vae_config"}
    assert changed(max_text_tokens=40) == {"tokenizer"}


def test_a_model_of_the_other_kind_is_refused(folder, tiny_models):
    with pytest.raises(ModelError, match=r"is a model of MSDM, expected one of Qwen-Image-Edit; set data.model to"):
        ModelFolder.open(folder.path, "qwen")
    with pytest.raises(ModelError, match="is a model of MSDM, expected one of Qwen-Image-Edit"):
        _ = folder.version
    with pytest.raises(ModelError, match=r"Qwen-Image-Edit 2509, expected one of MSDM; give the folder `network` of"):
        ModelFolder.open(tiny_models["2509"], "msdm")


@pytest.mark.parametrize(
    "file", ["vae/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"]
)
def test_a_missing_file_is_told_with_the_command_that_makes_such_a_folder(tmp_path, file):
    made = make_small_msdm(tmp_path / "network").path
    (made / file).unlink()
    with pytest.raises(ModelError) as problem:
        ModelFolder.open(made)
    assert str(problem.value).startswith(f"{made}: {file} is missing; give the folder `network` of a finished run of")


def test_weights_of_another_vae_than_the_config_says_are_refused(tmp_path):
    made = make_small_msdm(tmp_path / "network")
    file = made.path / "vae/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"latent_channels": 8}))
    with pytest.raises(ModelError, match="shape"):
        load_encoders(made, torch.float32, "cpu")
