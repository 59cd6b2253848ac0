"""The MMDiT: whose linears are adapted, what it is asked, and that our wrappings change no number."""

import pytest
import torch

from ccmdist.errors import ConfigError
from ccmdist.models import mmdit
from ccmdist.models.make import make_transformer
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.sizes import SIZES

DEAD = ["attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"]


@pytest.fixture(scope="module")
def full():
    """The published model, without weights."""
    with torch.device("meta"):
        return make_transformer(SIZES["full"], "2511")


@pytest.fixture(scope="module")
def tiny(tiny_models):
    """Version -> model in fp32."""
    folders = {version: ModelFolder.open(path) for version, path in tiny_models.items()}
    return {version: mmdit.build(folder, torch.float32, None) for version, folder in folders.items()}


def inputs(model, seed=0, num_samples=2):
    """Target of 4 x 6 tokens, mask of 4 x 6, 5 text tokens."""
    source = torch.Generator().manual_seed(seed)
    width = model.config.joint_attention_dim
    shapes = [(num_samples, 24, 64), (num_samples, 24, 64), (num_samples, 5, width)]
    latents, mask_latents, embeds = (torch.randn(shape, generator=source) for shape in shapes)
    return latents, mask_latents, embeds, torch.linspace(0.2, 0.9, num_samples), (4, 6), (4, 6)


def test_the_full_model_has_716_linears_that_learn(full):
    names = mmdit.linear_names(full, ("attn", "mlp"))
    assert len(names) == 60 * 12 - 4
    assert len(set(names)) == len(names)
    all_linears = {name for name, module in full.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(names) <= all_linears
    assert len(mmdit.linear_names(full, ("attn",))) == 60 * 8 - 2
    assert len(mmdit.linear_names(full, ("mlp",))) == 60 * 4 - 2


def test_four_linears_of_the_last_block_are_left_out(full):
    assert mmdit.dead_in_last_block(full) == DEAD
    every = {f"transformer_blocks.{index}.{layer}" for index in range(60) for layer in DEAD}
    chosen = set(mmdit.linear_names(full, ("attn", "mlp")))
    assert every - chosen == {f"transformer_blocks.59.{layer}" for layer in DEAD}


def test_the_search_for_dead_linears_builds_a_narrow_model_only(full, monkeypatch):
    sizes = []
    original = mmdit.velocity

    def velocity(model, *arguments):
        sizes.append(sum(p.numel() for p in model.parameters()))
        return original(model, *arguments)

    monkeypatch.setattr(mmdit, "velocity", velocity)
    mmdit.dead_in_last_block(full)
    assert len(sizes) == 1
    assert sizes[0] < 2e6, "each rank would hold a whole model in fp32 beside its part"


@pytest.mark.parametrize("version", ["v1", "2511"])
def test_exactly_the_linears_that_are_left_out_get_no_gradient(tiny, version):
    model = tiny[version]
    model.zero_grad()
    mmdit.velocity(model, *inputs(model)).square().sum().backward()
    blocks = {
        f"transformer_blocks.{index}.{name}": module.weight.grad
        for index, block in enumerate(model.transformer_blocks)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("attn.", "img_mlp.", "txt_mlp."))
    }
    dead = {name for name, gradient in blocks.items() if gradient is None or not gradient.any()}
    assert blocks.keys() - dead == set(mmdit.linear_names(model, ("attn", "mlp")))
    model.zero_grad()


def test_the_search_for_dead_linears_leaves_the_random_state_alone(full):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    mmdit.dead_in_last_block(full)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("targets", "count"),
    [(("attn.to_q",), 4), (("to_q",), 4), (("to_out.0", "to_q"), 8), (("net.2",), 7), (("img_mod.1",), 4)],
)
def test_suffixes_of_names_select_linears(tiny, targets, count):
    names = mmdit.linear_names(tiny["2509"], targets)
    assert len(names) == count
    assert all(name.endswith(targets) for name in names)


def test_names_come_in_the_order_of_the_model_whatever_the_order_of_the_targets(tiny):
    one, other = (mmdit.linear_names(tiny["2509"], targets) for targets in (("mlp", "attn"), ("attn", "mlp")))
    assert one == other


@pytest.mark.parametrize("target", ["img_mlp.*", "o_q", "transformer_blocks", "attn.to_qq"])
def test_a_target_that_matches_nothing_is_refused_with_the_names_there_are(tiny, target):
    with pytest.raises(ConfigError) as problem:
        mmdit.linear_names(tiny["2509"], ("attn", target))
    assert str(problem.value).startswith(
        f"adapter.targets: '{target}' matches none of the 56 linear layers in the blocks of "
        "QwenImageTransformer2DModel; use attn, mlp, or suffixes of "
    )
    assert "attn.to_q, attn.to_k, " in str(problem.value)


def test_a_skeleton_has_the_structure_and_no_weights(tiny_models):
    folder = ModelFolder.open(tiny_models["2511"])
    model = mmdit.skeleton(folder)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.config.zero_cond_t


def test_a_built_model_is_the_one_that_diffusers_loads(tiny_models, tiny):
    from diffusers import QwenImageTransformer2DModel

    stock = QwenImageTransformer2DModel.from_pretrained(tiny_models["2509"] / "transformer", torch_dtype=torch.float32)
    expected, found = stock.state_dict(), tiny["2509"].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not tiny["2509"].training


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
@torch.no_grad()
def test_the_velocity_is_what_the_stock_pipeline_asks_the_model_for(tiny_models, tiny, version):
    from diffusers import QwenImageTransformer2DModel

    path = tiny_models[version] / "transformer"
    stock = QwenImageTransformer2DModel.from_pretrained(path, torch_dtype=torch.float32).eval()
    latents, mask_latents, embeds, sigma, target_hw, mask_hw = inputs(stock)
    for index in range(2):
        one = slice(index, index + 1)
        timestep = sigma[one] * 1000
        predicted = stock(
            hidden_states=torch.cat([latents[one], mask_latents[one]], dim=1),
            timestep=timestep / 1000,
            encoder_hidden_states=embeds[one],
            encoder_hidden_states_mask=None,
            img_shapes=[[(1, *target_hw), (1, *mask_hw)]],
            return_dict=False,
        )[0][:, : latents.shape[1]]
        ours = mmdit.velocity(tiny[version], latents[one], mask_latents[one], embeds[one], sigma[one], (4, 6), (4, 6))
        assert torch.equal(ours, predicted)
    together = mmdit.velocity(tiny[version], latents, mask_latents, embeds, sigma, target_hw, mask_hw)
    torch.testing.assert_close(together[1:], predicted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_mask_the_text_and_the_noise_level_all_reach_the_velocity(tiny):
    model = tiny["2511"]
    given = inputs(model)
    expected = mmdit.velocity(model, *given)
    for place in (0, 1, 2, 3):
        changed = [*given]
        changed[place] = given[place].flip(-1)
        assert (mmdit.velocity(model, *changed) - expected).abs().max() > 1e-4, place


def test_blocks_made_leaves_compute_the_same_and_are_leaves(tiny_models):
    from deepspeed.utils import get_z3_leaf_modules

    model = mmdit.build(ModelFolder.open(tiny_models["2511"]), torch.float32, None)
    given = inputs(model)
    expected = mmdit.velocity(model, *given)
    names = list(model.state_dict())
    mmdit.make_blocks_leaves(model)
    assert get_z3_leaf_modules(model) == list(model.transformer_blocks)
    seen = []
    hook = model.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((len(args), set(kwargs))), with_kwargs=True
    )
    assert torch.equal(mmdit.velocity(model, *given), expected)
    hook.remove()
    assert seen == [(2, set(mmdit.BLOCK_ARGUMENTS[2:]))], "hooks of leaf modules see no keywords"
    assert list(model.state_dict()) == names
    model.enable_gradient_checkpointing()
    model.train()
    assert torch.equal(mmdit.velocity(model, *given), expected)
