"""Compiled blocks: one graph for all of a model, without a break, with the same numbers; and what is needed for it."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ccmdist.errors import ConfigError
from ccmdist.models import compiling, mmdit
from ccmdist.models.compiling import compiled_block_pass
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, levels, row_length
from ccmdist.models.sampling import GuidedVelocity
from ccmdist.models.tabulation import tabulate

HW = (4, 4)


def inputs(length):
    source = torch.Generator().manual_seed(0)
    latents, mask_latents = torch.randn(2, 2, 16, 64, generator=source)
    return latents, mask_latents, [torch.randn(2, n, 64, generator=source) for n in (length, 5)]


@pytest.fixture
def graphs(monkeypatch):
    """Counts graphs that dynamo captures; they then run as they are: a compiler would take minutes."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compile_by_torch = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **named: compile_by_torch(run, backend=counter, **named))
    yield counter
    torch._dynamo.reset()


@torch.no_grad()
def test_all_inner_blocks_of_a_tabled_model_share_a_graph_that_computes_the_same(tiny_models, graphs):
    folder, sigma = ModelFolder.open(tiny_models["2511"]), torch.tensor([0.9, 0.3])
    levels_N = levels(sigma, torch.float32)
    table = ModulationTable(levels_N, torch.empty(len(levels_N), row_length(mmdit.skeleton(folder))))
    tabulate(folder, levels_N, table.rows_NR, samples_at_once=2)
    model = mmdit.build(folder, torch.float32, None, table=table)
    run_block = compiled_block_pass(torch.device("cpu"))
    for num_lengths, length in enumerate((9, 11), start=1):
        latents, mask_latents, embeds = inputs(length)
        for _ in range(2):
            found = GuidedVelocity(model, mask_latents, embeds, HW, HW, run_block)(latents, sigma)
        expected = GuidedVelocity(model, mask_latents, embeds, HW, HW)(latents, sigma)
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
        assert graphs.frame_count == num_lengths, "two inner blocks and two calls of each length"


def test_without_a_compiler_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError) as refusal:
        compiled_block_pass(torch.device("cpu"))
    assert str(refusal.value) == (
        "compile_blocks: there is no compiler on PATH, looked for g++, clang++; "
        "load a compiler's module, or set compile_blocks=false"
    )
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(ConfigError, match="looked for icpx;"):
        compiled_block_pass(torch.device("cpu"))


def test_on_a_gpu_triton_is_needed_too(monkeypatch):
    monkeypatch.setattr(compiling, "_has_triton", lambda: False)
    with pytest.raises(ConfigError, match="Triton is not installed, or does not know this GPU"):
        compiled_block_pass(torch.device("cuda"))
