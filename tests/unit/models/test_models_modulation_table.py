"""A model whose modulation layers are a table computes what it did with them, bit for bit, and lacks their weights."""

import pytest
import torch

from ccmdist.diffusion import flow
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models import building, mmdit
from ccmdist.models.make import make_transformer
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, is_tabled, levels, row_length
from ccmdist.models.sizes import SIZES
from ccmdist.models.tabulation import tabulate

GRID = flow.training_sigmas(0.52)
HW = (4, 4)


def table_of(folder, dtype, samples_at_once, sigmas=GRID):
    levels_N = levels(sigmas, dtype)
    rows_NR = torch.full((len(levels_N), row_length(mmdit.skeleton(folder))), float("nan"), dtype=dtype)
    tabulate(folder, levels_N, rows_NR, samples_at_once)
    return ModulationTable(levels_N, rows_NR)


def asked(model, dtype, sigma_B, seed=0, latents=None):
    """The velocity of random inputs at these noise levels."""
    source = torch.Generator().manual_seed(seed)
    B = len(sigma_B)
    tokens = torch.randn(2, B, 16, 64, generator=source).to(dtype)
    embeds = torch.randn(B, 5, 64, generator=source).to(dtype)
    return mmdit.velocity(model, tokens[0] if latents is None else latents, tokens[1], embeds, sigma_B, HW, HW)


@pytest.fixture(scope="module")
def folders(tiny_models):
    return {version: ModelFolder.open(path) for version, path in tiny_models.items()}


@pytest.mark.parametrize("version", ["v1", "2509", "2511"])
@pytest.mark.parametrize(("dtype", "samples_at_once"), [(torch.bfloat16, n) for n in (1, 3, 64)] + [(torch.float32, 3)])
@torch.no_grad()
def test_the_output_is_bitwise_that_of_the_layers(folders, version, dtype, samples_at_once):
    """bf16: whatever the chunk. fp32: in the shape of the run."""
    folder = folders[version]
    plain = mmdit.build(folder, dtype, None)
    tabled = mmdit.build(folder, dtype, None, table=table_of(folder, dtype, samples_at_once))
    for places in ([0, 17, 999], [998, 1, 500], [321, 321, 640]):
        expected, found = (asked(model, dtype, GRID[places]) for model in (plain, tabled))
        assert torch.equal(found, expected), (found.float() - expected.float()).abs().max()


@pytest.mark.parametrize("version", ["2509", "2511"])
@torch.no_grad()
def test_in_fp32_a_table_of_another_shape_is_within_1e_6(folders, version):
    folder = folders[version]
    plain = mmdit.build(folder, torch.float32, None)
    for samples_at_once in (1, 64):
        tabled = mmdit.build(folder, torch.float32, None, table=table_of(folder, torch.float32, samples_at_once))
        expected, found = (asked(model, torch.float32, GRID[[7, 700]]) for model in (plain, tabled))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("version", ["2509", "2511"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bitwise_equal_also_when_blocks_are_computed_again(folders, version, dtype):
    folder, gradients = folders[version], []
    for table in (None, table_of(folder, dtype, 2)):
        for recompute in (False, True):
            model = mmdit.build(folder, dtype, None, table=table).train()
            model.requires_grad_(False)
            model.transformer_blocks[1].attn.to_q.weight.requires_grad_()
            if recompute:
                model.enable_gradient_checkpointing()
            asked(model, dtype, GRID[[3, 800]]).float().square().sum().backward()
            gradients.append(model.transformer_blocks[1].attn.to_q.weight.grad)
    assert gradients[0].abs().max() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


def test_the_full_model_keeps_two_thirds_of_its_weights():
    with torch.device("meta"):
        model = make_transformer(SIZES["full"], "2511")
        table = ModulationTable(torch.zeros(1), torch.empty(1, row_length(model), dtype=torch.bfloat16))
    weights = {name: weight.numel() for name, weight in model.named_parameters()}
    assert sum(weights.values()) == 20_430_401_088
    table.install(model)
    kept = sum(weight.numel() for weight in model.parameters())
    assert kept == sum(count for name, count in weights.items() if not is_tabled(name)) == 13_623_187_008
    assert kept / 20_430_401_088 < 0.667
    assert table.rows_NR.nbytes == (60 * 12 + 1) * 3072 * 2  # 4.4 MB for a noise level


def test_a_tabled_model_has_the_other_weights_under_their_names(folders):
    plain, tabled = (
        mmdit.build(folders["2511"], torch.float32, None, table=table)
        for table in (None, table_of(folders["2511"], torch.float32, 1, GRID[:1]))
    )
    expected, found = plain.state_dict(), tabled.state_dict()
    assert found.keys() == {name for name in expected if not is_tabled(name)}
    assert all(torch.equal(expected[name], found[name]) for name in found)
    assert mmdit.linear_names(tabled, ("attn", "mlp")) == mmdit.linear_names(plain, ("attn", "mlp"))


def test_modulation_layers_are_neither_allocated_nor_read(folders, monkeypatch):
    table = table_of(folders["2509"], torch.float32, 1, GRID[:1])
    read, made = [], []
    load, allocate = building.load_weights, building.allocate
    monkeypatch.setattr(building, "load_weights", lambda model, files, on_rows, **_: read.append(load(model, files)))
    monkeypatch.setattr(
        building, "allocate", lambda model, dtype_of, device: made.append(dtype_of) or allocate(model, dtype_of, device)
    )
    model = mmdit.build(folders["2509"], torch.float32, None, table=table)
    assert not any(map(is_tabled, made[0]))
    assert read == [sum(2 * weight.numel() for weight in model.parameters())], "bf16 in the files"


def test_bf16_needs_fewer_rows_than_there_are_levels():
    assert len(levels(GRID, torch.float32)) == 1001
    in_bf16 = levels(GRID, torch.bfloat16)
    assert len(in_bf16) < 600
    assert in_bf16[0] == 0
    assert (in_bf16.diff() > 0).all()
    assert set(GRID.bfloat16().tolist()) <= set(in_bf16.tolist())


def test_a_level_that_is_not_tabulated_is_refused_before_and_while_a_model_runs(folders):
    table = table_of(folders["2509"], torch.float32, 1, torch.tensor([0.5, 0.25]))
    message = (
        r"^denoise_steps: noise level 0\.3 is not among the 3 of the table of modulation, which go from 0 to 0\.5; "
        "use levels of the run's settings, or set tabulate_modulation=false$"
    )
    with pytest.raises(ConfigError, match=message):
        table.check(torch.tensor([0.5, 0.3]), "denoise_steps")
    table.check(torch.tensor([0.5, 0.25, 0.0]), "denoise_steps")
    model = mmdit.build(folders["2509"], torch.float32, None, table=table)
    with pytest.raises(ConfigError, match=r"^timestep: noise level 0\.6 "):
        asked(model, torch.float32, torch.tensor([0.5, 0.6]))
    with pytest.raises(ConfigError, match=r"^timestep: noise level 0\.75 "):
        asked(model, torch.float32, torch.tensor([0.75]))


@torch.no_grad()
def test_where_the_timesteps_lie_on_a_device_a_level_without_a_row_gives_nan_not_the_image_of_another(folders):
    table = table_of(folders["2511"], torch.float32, 2, torch.tensor([0.5, 0.25]))
    model = mmdit.build(folders["2511"], torch.float32, None, table=table)
    expected = asked(model, torch.float32, torch.tensor([0.5, 0.25]))
    table.rows = lambda timestep_B, device: table._rows_there(timestep_B)  # as on a GPU, where the host does not look
    assert torch.equal(asked(model, torch.float32, torch.tensor([0.5, 0.25])), expected)
    found = asked(model, torch.float32, torch.tensor([0.5, 0.3]))
    assert torch.equal(found[0], expected[0])
    assert found[1].isnan().all()


@torch.no_grad()
def test_whoever_asks_as_stock_pipelines_do_gets_the_same(folders):
    table = table_of(folders["2511"], torch.float32, 1, torch.tensor([0.5]))
    model = mmdit.build(folders["2511"], torch.float32, None, table=table)
    tokens, embeds = torch.randn(1, 32, 64), torch.randn(1, 5, 64)
    shapes = [[(1, *HW), (1, *HW)]]
    named = model(hidden_states=tokens, encoder_hidden_states=embeds, timestep=torch.tensor([0.5]), img_shapes=shapes)
    by_place = model(tokens, embeds, None, torch.tensor([0.5]), shapes)
    assert torch.equal(named.sample, by_place.sample)


def test_a_table_of_a_model_of_another_size_is_refused(folders):
    table = ModulationTable(torch.zeros(1), torch.zeros(1, 12), "/tmp/x.safetensors")
    with pytest.raises(ModelError, match=r"^/tmp/x.safetensors: a row has 12 values, expected 6272; remove it$"):
        mmdit.build(folders["2509"], torch.float32, None, table=table)
