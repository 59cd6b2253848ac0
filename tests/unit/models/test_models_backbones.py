"""Every backbone in its tiny form: conditions, sampler and exported adapters as stock diffusers has them."""

import logging
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.prompts import NEGATIVE_PROMPT, prompt
from ccmdist.config.train import LoRASettings, WDLoRASettings
from ccmdist.diffusion import flow
from ccmdist.diffusion.sampler import sample
from ccmdist.errors import ConfigError, ModelError
from ccmdist.jobs.model import TINY
from ccmdist.models.backbones.choice import BACKBONES, backbone_of
from ccmdist.models.backbones.flux import EMBEDDED_GUIDANCE
from ccmdist.models.encoder_choice import load_encoders
from ccmdist.models.flux_encoders import WordEncoder
from ccmdist.models.layout import FLUX, FLUX_CONTROL, KANDINSKY, MSDM
from ccmdist.models.make_flux import NUM_TEXT_TOKENS, make_clip_tokenizer, make_flux
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.processor import load_processor
from ccmdist.models.quantized import num_bytes
from ccmdist.models.text_encoders import MAX_KNOWN

TOKENS_HW, SIZE_PX, STEPS, GUIDANCE = (4, 4), 64, 4, 2.0

PROMPT = prompt("Control", {})


@dataclass
class World:
    """A tiny folder, its backbone, and its encoders in fp32."""

    folder: ModelFolder
    prompts: object
    codec: object

    def __post_init__(self):
        self.backbone = backbone_of(self.folder)

    def own_parts(self):
        """What stands for a processor of transformers that needs torchvision for films."""
        is_seen = self.folder.kind == "kandinsky5"
        return {"tokenizer": load_processor(self.folder.path, "tokenizer")} if is_seen else {}

    def stock(self):
        """The pipeline of diffusers, in fp32."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logging.getLogger("diffusers").setLevel(logging.ERROR)
            pipeline = diffusers.DiffusionPipeline.from_pretrained(
                self.folder.path, local_files_only=True, torch_dtype=torch.float32, **self.own_parts()
            )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def text(self, words):
        """Of one prompt with the picture, as a batch of a cache has it."""
        found = {"prompt_embeds": self.prompts.encode([words], [picture()])[0][None]}
        pooled = self.prompts.pooled([words])[0]
        return found if pooled is None else found | {"pooled_prompt_embeds": pooled[None]}


@pytest.fixture(scope="module", params=list(TINY))
def world(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    TINY[request.param](path)
    folder = ModelFolder.open(path)
    return World(folder, *load_encoders(folder, torch.float32, "cpu"))


def picture():
    return (np.random.default_rng(0).random((SIZE_PX, SIZE_PX)) > 0.8).astype(np.uint8) * 255


def test_tokenizers_of_small_models_are_the_same_in_every_process():
    """Training of a BPE settles ties by numbers of tokens, which a library may give in the order of a hash map."""
    code = "from ccmdist.models.make_flux import make_clip_tokenizer as m; print(m()._tokenizer.to_str())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert told.strip() == make_clip_tokenizer()._tokenizer.to_str()


def test_every_backbone_is_tried_here():
    assert set(BACKBONES) == {"qwen", *TINY}, "Qwen-Image-Edit has tests of its own"


def stock_text(kind, stock, words, shown):
    """A prompt as the stock pipeline of a kind encodes it."""
    given = {"image": shown} if kind == "kandinsky5" else {"prompt_2": words, "max_sequence_length": NUM_TEXT_TOKENS}
    with torch.no_grad():
        return stock.encode_prompt(words, **given)[:2]


def stock_latents(kind, stock, noise, conditions, shown):
    """What the stock pipeline of a kind draws from noise; of FLUX and Kandinsky with the negative prompt."""
    own = {
        "flux": {
            "image": shown,
            "negative_prompt": NEGATIVE_PROMPT,
            "true_cfg_scale": GUIDANCE,
            "guidance_scale": EMBEDDED_GUIDANCE,
            "max_area": SIZE_PX**2,
            "_auto_resize": False,
            "max_sequence_length": NUM_TEXT_TOKENS,
            "latents": noise,
        },
        "flux_control": {
            "control_image": shown,
            "guidance_scale": EMBEDDED_GUIDANCE,
            "max_sequence_length": NUM_TEXT_TOKENS,
            "latents": noise,
        },
        "kandinsky5": {"image": shown, "negative_prompt": NEGATIVE_PROMPT, "guidance_scale": GUIDANCE},
    }[kind]
    if kind == "kandinsky5":
        frame = [flow.unpack_latents(one, 8, 8).permute(0, 2, 3, 1)[:, None] for one in (noise, conditions)]
        own["latents"] = torch.cat([*frame, torch.ones_like(frame[0][..., :1])], dim=-1)
        stock.resolutions = [(SIZE_PX, SIZE_PX)]
    size = {"height": SIZE_PX, "width": SIZE_PX, "num_inference_steps": STEPS, "output_type": "latent"}
    with torch.no_grad():
        found = stock(prompt=PROMPT, **size, **own)
    if kind == "kandinsky5":
        return flow.pack_latents(found.image[:, 0].permute(0, 3, 1, 2))
    return found.images


def test_stock_diffusers_opens_the_folder_and_encodes_prompts_to_the_same_numbers(world):
    stock, shown = world.stock(), Image.fromarray(picture()).convert("RGB")
    assert type(stock).__name__ == world.folder.pipeline
    for words in (PROMPT, NEGATIVE_PROMPT):
        embeds, pooled = stock_text(world.folder.kind, stock, words, shown)
        found = world.text(words)
        assert torch.equal(found["prompt_embeds"], embeds)
        assert torch.equal(found["pooled_prompt_embeds"], pooled)
    texts = [world.text(prompt(group, {}))["prompt_embeds"] for group in CLINICAL_GROUPS]
    assert texts[0].shape != texts[1].shape or not torch.equal(texts[0], texts[1]), "the groups' words reach the model"


def test_images_are_drawn_as_stock_diffusers_draws_them(world, monkeypatch):
    stock, backbone, shown = world.stock(), world.backbone, Image.fromarray(picture()).convert("RGB")
    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(2))
    conditions = flow.pack_latents(world.codec.encode_structure(picture()[None]))
    # Where the stock pipeline samples the condition's posterior, ours takes its mode.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda posterior, generator=None: posterior.mode())
    expected = stock_latents(world.folder.kind, stock, noise, conditions, shown)

    guidance_scale = 1.0 if world.folder.kind == "flux_control" else GUIDANCE
    texts = [world.text(PROMPT), world.text(NEGATIVE_PROMPT)][: 1 if guidance_scale == 1 else 2]
    schedule = world.folder.noise_schedule()
    sigmas = flow.sampling_sigmas(STEPS, flow.resolution_shift(16, schedule), schedule)
    predict = backbone.predictor(backbone.build(torch.float32, None), conditions, texts, TOKENS_HW)
    found = sample(predict, noise, sigmas, guidance_scale, guidance=backbone.guidance)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_noise_levels_are_those_of_the_stock_scheduler(world):
    schedule = world.folder.noise_schedule()
    stock = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(world.folder.path / "scheduler")
    shift = flow.resolution_shift(576, schedule)
    if world.folder.kind == "kandinsky5":
        stock.set_timesteps(STEPS)
    else:
        stock.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS), mu=shift)
    torch.testing.assert_close(flow.sampling_sigmas(STEPS, shift, schedule), stock.sigmas, rtol=0, atol=1e-6)


def test_tables_and_dtypes_of_a_built_model_are_those_of_the_stock_class(world):
    for dtype in (torch.float32, torch.bfloat16):
        model = world.backbone.build(dtype, None)
        stock = type(model).from_pretrained(world.folder.path / "transformer", torch_dtype=dtype)
        for (name, ours), (same, theirs) in zip(model.named_buffers(), stock.named_buffers(), strict=True):
            assert (name, ours.dtype) == (same, theirs.dtype)
            assert torch.equal(ours, theirs)
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in stock.named_parameters()}
        assert num_bytes(world.folder, dtype, in_nf4=False) == sum(p.nbytes for p in model.parameters())


def test_latents_come_back_from_the_vae_as_grey_frames(world):
    frames = np.stack([picture(), np.roll(picture(), 7, axis=1)])
    latents = world.codec.encode(frames)
    assert latents.shape == (2, 16, 8, 8)
    torch.testing.assert_close(latents[:1], world.codec.encode(frames[:1]), rtol=0, atol=1e-5)
    coloured = np.repeat(frames[..., None], 3, axis=-1)
    assert torch.equal(world.codec.encode_structure(coloured), latents)
    decoded = world.codec.decode(latents)
    assert (decoded.shape, decoded.dtype) == (frames.shape, np.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [LoRASettings(lora_rank=4), WDLoRASettings(lora_rank=4)])
def test_a_new_adapter_changes_nothing_bit_for_bit_and_every_linear_of_it_learns(world, settings, dtype):
    backbone = world.backbone
    model = backbone.build(dtype, None).requires_grad_(False)
    source = torch.Generator().manual_seed(1)
    latents, conditions = torch.randn(2, 2, 16, 64, generator=source).to(dtype)
    text = {name: torch.cat([tensor, tensor.flip(1)]).to(dtype) for name, tensor in world.text(PROMPT).items()}
    sigma = torch.tensor([0.3, 0.8])
    before = backbone.velocity(model, latents, conditions, text, sigma, TOKENS_HW).detach()
    names = backbone.linear_names(model, ("attn", "mlp"))
    adapted = inject(model, names, settings, row_squares_of(model, names), seed=0)
    after = backbone.velocity(model, latents, conditions, text, sigma, TOKENS_HW)
    assert torch.equal(after, before)
    after.float().square().mean().backward()
    without = [name for name, p in adapted.parameters.items() if name.endswith("lora_B") and not p.grad.any()]
    assert without == [], "they reach nothing that is read"


def test_without_single_streams_the_last_text_output_is_read_by_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr("ccmdist.models.make_flux.TRANSFORMER", {**_transformer(), "num_single_layers": 0})
    make_flux(tmp_path)
    backbone = backbone_of(ModelFolder.open(tmp_path))
    names = backbone.linear_names(backbone.skeleton(), ("attn", "mlp"))
    dead = {"attn.add_q_proj", "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2"}
    assert {name.removeprefix("transformer_blocks.1.") for name in backbone.dead(backbone.skeleton())} == dead
    assert len(names) == 2 * 12 - len(dead)


def test_a_target_that_matches_nothing_is_refused_by_name(world):
    skeleton = world.backbone.skeleton()
    with pytest.raises(ConfigError, match=r"'attn\.to_x' matches none of the \d+ linear layers in the blocks of"):
        world.backbone.linear_names(skeleton, ("attn.to_x",))


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(world):
    words = PROMPT + " nerve" * NUM_TEXT_TOKENS
    if world.folder.kind == "kandinsky5":
        with pytest.raises(ConfigError, match=r"has, with its picture, 11\d\d tokens, the transformer takes 1024"):
            world.prompts.encode([PROMPT, PROMPT + " nerve" * 1100], [picture()] * 2)
    else:
        with pytest.raises(ConfigError, match=r"nerve nerve' has \d+ tokens, T5 takes 64"):
            world.prompts.encode([words], [None])
    with pytest.raises(ConfigError, match=r"has \d+ tokens, CLIP takes 77"):
        world.prompts.pooled([words])


def test_what_is_said_around_a_prompt_is_part_of_what_a_cache_is_named_by(world, monkeypatch):
    before = world.folder.encoder_identity()
    assert before.keys() >= {"kind", "call_version", "tokenizer", "tokenizer_2", "text_encoder_2_weights", "vae_config"}
    monkeypatch.setitem(KANDINSKY.words, "num_dropped_tokens", 55)
    assert (world.folder.encoder_identity() != before) == bool(world.folder.layout.words)


def test_of_free_prompts_only_the_last_few_are_remembered():
    """Each takes 4 MB of a GPU in T5's embeddings."""
    asked = []
    tokenizer = make_clip_tokenizer()
    encoder = WordEncoder("CLIP", tokenizer, 77, lambda of: asked.append(1) or of["input_ids"][0])
    texts = [f"nerve {number}" for number in range(MAX_KNOWN + 1)]
    for text in texts:
        assert torch.equal(encoder(text), encoder(text))
    assert len(asked) == len(texts)
    encoder(texts[0])
    assert len(asked) == len(texts) + 1
    assert encoder._remembered.cache_info().currsize == MAX_KNOWN


def test_a_model_that_is_not_there_is_told_how_to_get(world, tmp_path):
    (tmp_path / "model_index.json").write_bytes((world.folder.path / "model_index.json").read_bytes())
    with pytest.raises(ModelError, match=r"scheduler_config\.json is missing") as told:
        ModelFolder.open(tmp_path)
    assert ("accept its licence at https://huggingface.co/black" in str(told.value)) == world.folder.layout.is_gated
    assert f"hf download {world.folder.layout.repositories[0]}" in str(told.value)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "FLUX.1-Kontext-dev",
            "accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-Kontext-dev, log in ",
        ),
        ("FLUX.1-Depth-dev", "run `hf download black-forest-labs/FLUX.1-Depth-dev --local-dir FLUX.1-Depth-dev`"),
        ("tiny-flux_control", "`ccmdist model make --kind flux_control --out "),
        ("tiny-flux", "`ccmdist model make --kind flux --out "),
        ("Kandinsky-5.0-I2I-Lite-sft-Diffusers", "`hf download kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers "),
        ("tiny", "`ccmdist model make --size tiny --fitted --out "),
        ("network", "of a finished run of `ccmdist train configs/train/wdlora.yaml configs/train/msdm_vae.yaml`"),
    ],
)
def test_a_folder_that_is_not_there_is_taken_for_what_it_is_named_for(name, told, tmp_path):
    with pytest.raises(ModelError, match="there is no such folder") as problem:
        ModelFolder.open(tmp_path / name)
    assert told in str(problem.value)


def test_weights_that_are_pointers_of_a_gated_download_are_refused_with_its_licence(world, tmp_path):
    copy = shutil.copytree(world.folder.path, tmp_path / "copy")
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 23\n")
    with pytest.raises(ModelError, match="is not a complete safetensors file") as told:
        ModelFolder.open(copy)
    assert ("accept its licence at " in str(told.value)) == world.folder.layout.is_gated


def test_where_a_model_is_published_is_not_guessed_between_two_places():
    assert FLUX_CONTROL.published_as(Path("models/FLUX.1-Depth-dev"), None) == "black-forest-labs/FLUX.1-Depth-dev"
    assert FLUX_CONTROL.published_as(Path("models/mine"), None) == ""
    assert FLUX.published_as(Path("models/mine"), None) == "black-forest-labs/FLUX.1-Kontext-dev"


def test_no_model_that_only_encodes_is_taken_for_a_backbone(tmp_path):
    with pytest.raises(ModelError, match="is a model of MSDM, expected one of Qwen-Image-Edit, FLUX"):
        backbone_of(ModelFolder(tmp_path, None, MSDM))


def _transformer():
    from ccmdist.models.make_flux import TRANSFORMER

    return TRANSFORMER
