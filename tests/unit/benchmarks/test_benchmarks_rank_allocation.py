"""What benchmarks/rank_allocation.py rests on: DyLoRA's layer, and the one rule by which learning rates are found."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.unit.benchmarks.small_scripts import BENCHMARKS


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/, by its name there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("b", [1, 3, 4])
def test_a_nested_layer_is_a_lora_of_its_first_ranks_with_the_same_alpha(module, b):
    rivals, lora = module("measure.rivals"), module("ccmdist.adapters.lora")
    rank, alpha, base = 4, 6.0, nn.Linear(5, 7).double().requires_grad_(False)
    whole = lora.LoRALinear(base, rank, alpha / rank, "layer", 0)
    nn.init.normal_(whole.lora_B)
    part = lora.LoRALinear(base, b, alpha / b, "layer", 0)
    part.lora_A.data, part.lora_B.data = whole.lora_A[:b].detach(), whole.lora_B[:, :b].detach()
    whole.__class__, whole.drawn = rivals.NestedLinear, rivals.DrawnRank()
    whole.drawn.of_step = b
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(whole(x), part(x), rtol=1e-12, atol=1e-12)
    whole(x).square().sum().backward()
    assert not whole.lora_A.grad[b:].any()
    assert not whole.lora_B.grad[:, b:].any()


@pytest.mark.parametrize(
    ("best", "tried"),
    [(4, {3, 4, 5}), (3, {2, 3, 4, 5}), (7, {3, 4, 5, 6, 7, 8}), (0, {0, 1, 2, 3, 4, 5}), (8, {3, 4, 5, 6, 7, 8})],
)
def test_a_learning_rate_is_sought_until_the_best_has_a_worse_one_on_either_side(module, monkeypatch, best, tried):
    benchmark = module("rank_allocation")
    runs = []

    def trained(way, index, seed, split):
        runs.append((index, seed, split))
        return benchmark.Trained(float(abs(index - best)), 10, {})

    monkeypatch.setattr(benchmark.Way, "_trained", trained)
    way = benchmark.Way("LoRA", benchmark.World(Path("unused"), 1)).run(2)
    assert set(way.tried) == tried
    assert way.best == best
    assert [run for run in runs if run[1] == benchmark.SEARCH_SEED] == [
        (index, benchmark.SEARCH_SEED, "val") for index in way.tried
    ]
    assert runs[-2:] == [(best, 0, "test"), (best, 1, "test")]
    assert math.isclose(benchmark.LEARNING_RATES[4], 1e-2)
