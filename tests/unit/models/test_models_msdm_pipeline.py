"""What a trained MSDM leaves is a folder that stock diffusers opens, and draws with as our sampler does."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import NEGATIVE_PROMPT, prompt
from ccmdist.diffusion import ddpm
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models import msdm_unet
from ccmdist.models.encoder_choice import load_encoders
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_state import NetworkState, read_network, write_network
from tests.small_msdm import UNET, network_state, write_encoders

SIZE_PX, STEPS, GUIDANCE = 64, 4, 3.0
STOCK = {True: "StableDiffusionInstructPix2PixPipeline", False: "StableDiffusionPipeline"}
CPU = torch.device("cpu")


def write_clip(folder):
    """A tiny CLIP text model with a tokenizer of its own kind."""
    blank = CLIPTokenizer()
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer, trained.pre_tokenizer = blank._tokenizer.normalizer, blank._tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, show_progress=False, initial_alphabet=alphabet, end_of_word_suffix="</w>"
    )
    trained.train_from_iterator([prompt(group, {}) for group in (None, *CLINICAL_GROUPS)], trainer)
    learnt = json.loads(trained.to_str())["model"]
    ids = learnt["vocab"]
    for token in [f"{letter}</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]:
        ids.setdefault(token, len(ids))
    tokenizer = CLIPTokenizer(vocab=ids, merges=[tuple(pair) for pair in learnt["merges"]], model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=ids["<|startoftext|>"],
        eos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
    )
    torch.manual_seed(0)
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bert", "clip"])
def encoders(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return write_encoders(folder / "vae", SIZE_PX, None if request.param == "bert" else write_clip(folder / "clip"))


@pytest.mark.parametrize("with_mask", [True, False])
def test_stock_diffusers_opens_the_folder_and_draws_what_we_draw(encoders, with_mask, tmp_path):
    state = network_state(encoders, SIZE_PX, UNET.model_copy(update={"mask_condition": with_mask}))
    write_network(tmp_path, state)
    folder = ModelFolder.open(tmp_path, "msdm")
    assert folder.encoder_identity() == ModelFolder.open(encoders).encoder_identity(), "one cache for both"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(pipeline).__name__ == STOCK[with_mask]
    assert pipeline.unet.config.sample_size == SIZE_PX // 4
    pipeline.set_progress_bar_config(disable=True)
    text, mask = prompt("T1DPN", {}), np.random.default_rng(0).random((SIZE_PX, SIZE_PX)) > 0.8
    mask = mask.astype(np.uint8) * 255
    noise = torch.randn(1, 4, SIZE_PX // 4, SIZE_PX // 4, generator=torch.Generator().manual_seed(3))
    seen = {"image": Image.fromarray(mask).convert("RGB"), "image_guidance_scale": 1.0} if with_mask else {}
    stock = pipeline(
        text, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.clone(), output_type="np", **seen
    ).images[0]

    prompts, codec = load_encoders(folder, torch.float32, CPU)
    texts = [one[None] for one in prompts.encode([text, NEGATIVE_PROMPT], [mask, mask])]
    mask_latents = codec.encode_structure(mask[None]) if with_mask else None
    network = read_network(tmp_path).network(CPU)

    def predict(latents, level):
        level_B = torch.tensor([level])
        return tuple(msdm_unet.predicted(network, latents, mask_latents, one, level_B) for one in texts)

    drawn = ddpm.sample(predict, noise, ddpm.NoiseSchedule.of(state.about.settings), STEPS, GUIDANCE)
    vae = codec.vae
    with torch.no_grad():
        ours = (vae.decode(drawn / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 0)
    assert stock.std() > 1e-3
    np.testing.assert_allclose(ours.numpy(), stock, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("bert_alone"), SIZE_PX)


def test_a_network_is_read_back_as_it_was_written_and_may_be_written_over_itself(bert, tmp_path):
    state = network_state(bert, SIZE_PX)
    write_network(tmp_path, state)
    found = read_network(tmp_path)
    assert found.about == state.about
    assert found.parts == tmp_path
    assert all(torch.equal(value, state.tensors[name]) for name, value in found.tensors.items())
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write_network(tmp_path, found)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_weights_depend_on_the_seed_alone_and_are_all_that_a_checkpoint_has_to_keep():
    networks = [msdm_unet.make_unet(UNET, msdm_unet.Ends(4, 32), seed) for seed in (3, 3, 4)]
    first, again, other = (dict(network.named_parameters()) for network in networks)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert not list(networks[0].named_buffers())
    assert msdm_unet.Ends.of(networks[0].state_dict()) == msdm_unet.Ends(4, 32)


def test_what_is_predicted_depends_on_level_mask_and_text_but_not_on_images_beside_it(bert):
    network = network_state(bert).network(CPU)
    source = torch.Generator().manual_seed(1)
    latents, mask = (torch.randn(2, 4, 8, 8, generator=source) for _ in range(2))
    text, level = torch.randn(2, 9, network.config.encoder_hid_dim, generator=source), torch.tensor([400, 400])
    with torch.no_grad():
        told = msdm_unet.predicted(network, latents, mask, text, level)
        alone = msdm_unet.predicted(network, latents[:1], mask[:1], text[:1], level[:1])
        others = [
            msdm_unet.predicted(network, latents, mask.flip(0), text, level),
            msdm_unet.predicted(network, latents, mask, text.flip(0), level),
            msdm_unet.predicted(network, latents, mask, text, level // 2),
        ]
    torch.testing.assert_close(told[:1], alone, rtol=0, atol=1e-5)
    assert all((other - told)[0].abs().max() > 1e-4 for other in others)


def test_a_dropped_prompt_is_the_negative_one():
    text, null = torch.randn(3, 5, 2), torch.zeros(5, 2)
    found = msdm_unet.dropped(text, null, [False, True, False])
    assert torch.equal(found, torch.stack([text[0], null, text[2]]))


def test_states_that_do_not_divide_into_heads_are_refused():
    with pytest.raises(
        ConfigError, match=r"heads: the text encoder's states have 30 channels, which do not divide into 4"
    ):
        msdm_unet.make_unet(UNET, msdm_unet.Ends(4, 30), 0)


def test_weights_that_do_not_fit_their_settings_are_refused(bert, tmp_path):
    state = network_state(bert, SIZE_PX)
    for left_out, problem in (
        ("conv_out.bias", "missing 'conv_out.bias'"),
        ("conv_in.bias", "does not fit its settings"),
    ):
        tensors = {name: value for name, value in state.tensors.items() if name != left_out}
        broken = NetworkState.of(UNET, SIZE_PX, tensors, {}, bert)
        with pytest.raises(ModelError, match=re.escape(problem)):
            broken.network(CPU)
    write_network(tmp_path, state)
    (tmp_path / msdm_unet.WEIGHTS).unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors: is missing"):
        read_network(tmp_path)
