"""All branches of guidance in one pass: equal to one forward of the stock class for each, and nothing more is done."""

import copy

import pytest
import torch
from diffusers import QwenImageTransformer2DModel

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.config.train import WDLoRASettings
from ccmdist.models import mmdit, sampling
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, levels, row_length
from ccmdist.models.sampling import GuidedVelocity
from ccmdist.models.tabulation import tabulate

TARGET_HW, MASK_HW = (4, 6), (4, 4)
NUM_TARGET, NUM_MASK = 24, 16
NUM_SAMPLES = 2
LONG_AND_SHORT = [(9, 5), (5, 9), (7, 7), (9,)]


@pytest.fixture(scope="module", params=["2509", "2511"])
def model(request, tiny_models):
    """The stock class, loaded by itself, with biases and gains that are not 0 and 1."""
    loaded = QwenImageTransformer2DModel.from_pretrained(
        tiny_models[request.param] / "transformer", torch_dtype=torch.float32
    ).eval()
    source = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=source)
    assert loaded.zero_cond_t == (request.param == "2511")
    return loaded.requires_grad_(False)


def inputs(num_text, dtype=torch.float32):
    source = torch.Generator().manual_seed(1)
    tokens = [(NUM_TARGET, 64), (NUM_MASK, 64), *((length, 64) for length in num_text)]
    latents, mask_latents, *embeds = (torch.randn(NUM_SAMPLES, *shape, generator=source).to(dtype) for shape in tokens)
    return latents, mask_latents, embeds, torch.tensor([0.9, 0.3])


def branch_by_branch(model, latents, mask_latents, embeds, sigma, num_masks=1):
    """A forward of the stock class for each branch."""
    shapes = [[(1, *TARGET_HW), *[(1, *MASK_HW)] * num_masks]] * NUM_SAMPLES
    tokens, timestep = torch.cat([latents, mask_latents], dim=1), sigma.to(latents.dtype)
    given = {"hidden_states": tokens, "timestep": timestep, "img_shapes": shapes, "return_dict": False}
    return [model(encoder_hidden_states=one, **given)[0][:, :NUM_TARGET] for one in embeds]


def assert_equal(found, expected, tolerance):
    assert len(found) == len(expected)
    for ours, stock in zip(found, expected, strict=True):
        assert stock.std() > 0.1
        torch.testing.assert_close(ours, stock, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("num_text", LONG_AND_SHORT)
@torch.no_grad()
def test_every_branch_equals_a_forward_of_its_own(model, num_text):
    latents, mask_latents, embeds, sigma = inputs(num_text)
    predict = GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)
    for later in (latents, latents.flip(0)):
        # What is kept over the denoise steps must not depend on the first of them.
        expected = branch_by_branch(model, later, mask_latents, embeds, sigma.flip(0))
        assert_equal(predict(later, sigma.flip(0)), expected, 1e-6)


@pytest.mark.parametrize("num_text", [(9, 5), (9,)])
@torch.no_grad()
def test_several_condition_images_are_seen_as_the_stock_class_sees_them(model, num_text):
    latents, mask_latents, embeds, sigma = inputs(num_text)
    both = torch.cat([mask_latents, mask_latents.flip(0, 1)], dim=1)
    expected = branch_by_branch(model, latents, both, embeds, sigma, num_masks=2)
    assert_equal(GuidedVelocity(model, both, embeds, TARGET_HW, MASK_HW)(latents, sigma), expected, 1e-6)
    asked = [mmdit.velocity(model, latents, both, one, sigma, TARGET_HW, MASK_HW) for one in embeds]
    assert all(torch.equal(ours, stock) for ours, stock in zip(asked, expected, strict=True))
    alone = branch_by_branch(model, latents, mask_latents, embeds, sigma)
    assert (alone[0] - expected[0]).abs().max() > 0.01
    swapped = GuidedVelocity(model, both.roll(NUM_MASK, 1), embeds, TARGET_HW, MASK_HW)(latents, sigma)
    assert (swapped[0] - expected[0]).abs().max() > 1e-3, "which image comes first is told by its place"


@torch.no_grad()
def test_one_condition_image_is_asked_for_as_the_stock_class_is(model):
    latents, mask_latents, (embeds,), sigma = inputs((9,))
    found = mmdit.velocity(model, latents, mask_latents, embeds, sigma, TARGET_HW, MASK_HW)
    (expected,) = branch_by_branch(model, latents, mask_latents, [embeds], sigma)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_tokens_that_are_no_whole_images_are_not_passed_over(model):
    latents, mask_latents, (embeds,), sigma = inputs((9,))
    with pytest.raises(AssertionError, match=r"^15 tokens are not whole images of \(4, 4\)$"):
        mmdit.velocity(model, latents, mask_latents[:, 1:], embeds, sigma, TARGET_HW, MASK_HW)


@torch.no_grad()
def test_in_bf16_it_errs_no_more_than_the_stock_class(model):
    half = QwenImageTransformer2DModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    half.load_state_dict(model.state_dict())
    half = torch.nn.Module.to(half, torch.bfloat16).eval()
    exact = copy.deepcopy(half).float()
    latents, mask_latents, embeds, sigma = inputs((9, 5), torch.bfloat16)
    found = GuidedVelocity(half, mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma)
    stock = branch_by_branch(half, latents, mask_latents, embeds, sigma)
    wide = (latents.float(), mask_latents.float(), [one.float() for one in embeds], sigma.bfloat16().float())
    for ours, theirs, true in zip(found, stock, branch_by_branch(exact, *wide), strict=True):
        assert (ours - true).abs().mean() < 1.05 * (theirs - true).abs().mean()


@torch.no_grad()
def test_adapted_linears_are_called_as_the_model_calls_them(tiny_models):
    model = mmdit.build(ModelFolder.open(tiny_models["2509"]), torch.float32, None).requires_grad_(False)
    latents, mask_latents, embeds, sigma = inputs((9, 5))
    plain = GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma)
    names = mmdit.linear_names(model, ("attn", "mlp"))
    adapted = inject(model, names, WDLoRASettings(lora_rank=4), row_squares_of(model, names), seed=0)
    for name, parameter in adapted.parameters.items():
        if name.endswith("lora_B"):
            parameter.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    adapted.advance()
    found = GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma)
    assert_equal(found, branch_by_branch(model, latents, mask_latents, embeds, sigma), 1e-6)
    assert (found[1] - plain[1]).abs().max() > 0.01


@torch.no_grad()
def test_attention_sees_whole_branches_without_padding_and_without_a_mask(model, monkeypatch):
    seen = []

    def attend(query, key, value, *others, **named):
        assert not others
        assert list(named) == ["backend"], "a mask"
        seen.append((query.shape[1], key.shape[1], value.shape[1], len(query)))
        return original(query, key, value, **named)

    original = sampling.dispatch_attention_fn
    monkeypatch.setattr(sampling, "dispatch_attention_fn", attend)
    latents, mask_latents, embeds, sigma = inputs((9, 5))
    GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma)
    long, short = NUM_TARGET + NUM_MASK + 9, NUM_TARGET + NUM_MASK + 5
    whole = [(long, long, long, NUM_SAMPLES), (short, short, short, NUM_SAMPLES)]
    last = [(NUM_TARGET, long, long, NUM_SAMPLES), (NUM_TARGET, short, short, NUM_SAMPLES)]
    assert seen == whole * (len(model.transformer_blocks) - 1) + last


@torch.no_grad()
def test_nothing_is_computed_twice_or_for_nobody(model):
    rows = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: rows.setdefault(name, []).append(args[0].shape[1]))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    latents, mask_latents, embeds, sigma = inputs((9, 5))
    predict = GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)
    assert (rows.pop("img_in"), rows.pop("txt_in")) == ([NUM_MASK], [9, 5])
    predict(latents, sigma)
    for hook in hooks:
        hook.remove()
    both, text, last = 2 * (NUM_TARGET + NUM_MASK), 9 + 5, len(model.transformer_blocks) - 1
    assert rows["img_in"] == [NUM_TARGET]
    assert "txt_in" not in rows
    assert all(len(calls) == 1 for calls in rows.values())
    first = {name: rows[f"transformer_blocks.0.{name}"][0] for name in ("attn.to_q", "attn.to_k", "img_mlp.net.2")}
    assert first == {"attn.to_q": both // 2, "attn.to_k": both // 2, "img_mlp.net.2": both}
    middle = {name: rows[f"transformer_blocks.1.{name}"][0] for name in ("attn.to_q", "txt_mlp.net.2")}
    assert middle == {"attn.to_q": both, "txt_mlp.net.2": text}
    for name in ("attn.to_q", "attn.to_out.0", "img_mlp.net.0.proj"):
        assert rows[f"transformer_blocks.{last}.{name}"] == [2 * NUM_TARGET]
    assert {name for name in mmdit.dead_in_last_block(model) if f"transformer_blocks.{last}.{name}" in rows} == set()
    assert rows["proj_out"] == [2 * NUM_TARGET]


def test_it_keeps_no_graph(model):
    latents, mask_latents, embeds, sigma = inputs((9,))
    (found,) = GuidedVelocity(model.requires_grad_(True), mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma)
    model.requires_grad_(False)
    assert not found.requires_grad


def test_tokens_of_branches_are_put_together_in_the_order_of_the_model_and_parted_again():
    tokens = sampling.Tokens(num_target=2, num_mask=3, num_text=(1, 2))
    text, image = torch.arange(3.0).view(1, 3, 1, 1), 10 + torch.arange(10.0).view(1, 10, 1, 1)
    joint = [one.flatten().tolist() for one in tokens.joint(text, image, 2)]
    assert joint == [[0, 10, 11, 14, 15, 16], [1, 2, 12, 13, 17, 18, 19]]
    shared = [one.flatten().tolist() for one in tokens.joint(text, image[:, :5], 1)]
    assert shared == [[0, 10, 11, 12, 13, 14], [1, 2, 10, 11, 12, 13, 14]]
    asking = [one.flatten().tolist() for one in tokens.joint(None, image[:, :4], 2)]
    assert asking == [[10, 11], [12, 13]]
    parts = tokens.parted([one.flatten(2) for one in tokens.joint(text, image, 2)])
    assert torch.equal(parts[0], text.flatten(2))
    assert torch.equal(parts[1], image.flatten(2))


@pytest.mark.parametrize("version", ["2509", "2511"])
@torch.no_grad()
def test_a_tabled_model_predicts_the_same(tiny_models, version):
    folder = ModelFolder.open(tiny_models[version])
    latents, mask_latents, embeds, sigma = inputs((9, 5))
    levels_N = levels(sigma, torch.float32)
    rows_NR = torch.empty(len(levels_N), row_length(mmdit.skeleton(folder)))
    tabulate(folder, levels_N, rows_NR, samples_at_once=NUM_SAMPLES)
    tabled = mmdit.build(folder, torch.float32, None, table=ModulationTable(levels_N, rows_NR))
    plain = mmdit.build(folder, torch.float32, None)
    found, expected = (
        GuidedVelocity(model, mask_latents, embeds, TARGET_HW, MASK_HW)(latents, sigma) for model in (tabled, plain)
    )
    # Products of another number of rows may round otherwise, and 2511 has twice as many.
    assert_equal(found, expected, 1e-6)
