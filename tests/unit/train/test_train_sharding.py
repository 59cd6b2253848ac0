"""What becomes of `sharding` on ranks that lie in one way or another."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ccmdist.adapters.frozen import freeze_linears
from ccmdist.cluster.ranks import Ranks, common_ranks_per_node
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ConfigError
from ccmdist.models.layout import QWEN
from ccmdist.train import sharding as module
from ccmdist.train.flat_blocks import flatten_blocks
from ccmdist.train.sharding import hide_frozen_weights, settle_sharding


def settled(sharding, world_size, ranks_per_node, *overrides):
    group = SimpleNamespace(
        ranks=Ranks(0, 0, world_size),
        ranks_per_node=ranks_per_node,
        device=torch.device("cpu"),
        maximum=lambda values: values,
    )
    folders = [f"data.{name}=unused" for name in ("shards", "model", "cache")]
    config = load(TrainConfig, [], ["run=unused", *folders, f"sharding={sharding}", *overrides])
    return settle_sharding(config, group).sharding


@pytest.mark.parametrize("sharding", ["zero3", "replicated"])
def test_what_is_set_is_done(sharding):
    assert settled(sharding, 4, 1) == sharding


def test_cutting_over_each_node_needs_several_nodes_of_several_ranks():
    assert settled("zero3_hpz", 8, 4) == "zero3_hpz"
    assert settled("zero3_hpz", 4, 4) == "zero3"
    with pytest.raises(ConfigError, match=r"each node has one rank: .*; set sharding=replicated, .*sharding=zero3$"):
        settled("zero3_hpz", 4, 1)
    with pytest.raises(ConfigError, match=r"do not all have the same number .* --ntasks-per-node, or set sharding="):
        settled("zero3_hpz", 3, None)


def test_auto_is_decided_and_the_reason_told(caplog, monkeypatch):
    folder = SimpleNamespace(
        version="2509", layout=QWEN, config=lambda part: {"num_layers": 2, "num_attention_heads": 1}
    )
    monkeypatch.setattr(module, "ModelFolder", SimpleNamespace(open=lambda path: folder))
    caplog.set_level(logging.INFO)
    assert settled("auto", 2, 2) == "zero3"
    assert "sharding: zero3 (ranks on CPUs share one memory" in caplog.text
    assert settled("auto", 2, 2, "base=nf4") == "replicated"


@pytest.mark.parametrize(
    ("local_ranks", "expected"), [([0], 1), ([0, 1, 2], 3), ([0, 1, 0, 1], 2), ([0, 0], 1), ([0, 1, 0], None),
                                  ([0, 0, 1, 1], None)]
)  # fmt: skip
def test_ranks_per_node_are_those_of_every_node(local_ranks, expected):
    assert common_ranks_per_node(local_ranks) == expected


def test_blocks_of_one_frozen_parameter_compute_the_same():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2, bias=False)).requires_grad_(False)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)
    blocks = torch.nn.ModuleList([model])
    flatten_blocks(blocks)
    freeze_linears(blocks)
    assert {name: len(p.shape) for name, p in model.named_parameters()} == {"flat": 2, "0.bias": 1}
    assert torch.equal(*torch.autograd.grad(model(x).square().sum(), x), *expected)


def test_hidden_weights_keep_their_names_and_compute_the_same():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model[1].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    expected, state = model(x), model.state_dict()
    hide_frozen_weights(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert torch.equal(model(x), expected)
    assert set(model.state_dict()) == set(state)
