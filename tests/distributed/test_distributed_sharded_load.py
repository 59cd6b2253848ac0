"""Two ranks read half of the weights each, and together they are the model that one process reads whole."""

import pytest
import torch
from safetensors.torch import save_file

from ccmdist.adapters.injection import RowSquares, row_squares_of
from ccmdist.models import mmdit
from ccmdist.models.model_folder import ModelFolder

pytestmark = pytest.mark.distributed

ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def forward(model):
    source = torch.Generator().manual_seed(0)
    latents, mask_latents = torch.randn(2, 1, 16, 64, generator=source)
    embeds = torch.randn(1, 5, 64, generator=source)
    with torch.no_grad():
        return mmdit.velocity(model, latents, mask_latents, embeds, torch.tensor([0.6]), (4, 4), (4, 4))


def load_partitioned(group, path):
    """On one rank: the forward, the bytes that it read, the norms of rows and how often each row was told."""
    import deepspeed

    from ccmdist.models import building

    folder, read, told = ModelFolder.open(path), [], {}
    names = mmdit.linear_names(mmdit.skeleton(folder), ("attn", "mlp"))
    squares = RowSquares(names)
    original = building.load_weights

    def counted(*arguments, **named):
        read.append(original(*arguments, **named))
        return read[-1]

    def on_rows(name, first, rows, num_rows):
        told.setdefault(name, torch.zeros(num_rows))[first : first + len(rows)] += 1
        squares.on_rows(name, first, rows, num_rows)

    building.load_weights = counted
    model = mmdit.build(folder, torch.float32, ZERO, on_rows)
    building.load_weights = original
    shapes = {name: parameter.ds_shape for name, parameter in model.named_parameters()}
    kept = sum(parameter.ds_tensor.nbytes for parameter in model.parameters())
    mmdit.make_blocks_leaves(model)
    engine, *_ = deepspeed.initialize(model=model, config=ZERO)
    rest = {name: torch.zeros(shape[0]) for name, shape in shapes.items() if name not in told}
    odd = load_odd_rows(path / "odd.safetensors")
    return odd | {
        "velocity": forward(engine),
        "read": read[0],
        "kept": kept,
        "squares": squares.reduce(),
        "told": told | rest,
    }


def load_odd_rows(file):
    """A layer of 5 rows of 3: the border between two partitions lies within a row."""
    import deepspeed

    from ccmdist.models.checkpoint_io import load_weights

    told, squares = torch.zeros(5), RowSquares(["layer"])

    def on_rows(name, first, rows, num_rows):
        if name == "layer.weight":
            told[first : first + len(rows)] += 1
        squares.on_rows(name, first, rows, num_rows)

    with deepspeed.zero.Init(config_dict_or_path=ZERO, dtype=torch.float32):
        model = torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 5)})
    load_weights(model, dict.fromkeys(("layer.weight", "layer.bias"), file), on_rows)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {"odd_told": told, "odd_weight": model["layer"].weight.clone(), "odd_squares": squares.reduce()["layer"]}


def test_two_ranks_read_half_each_and_hold_the_same_model(run_ranks, tmp_path):
    from ccmdist.models.make import make_model

    make_model("tiny", "2511", tmp_path / "model")
    odd = {"layer.weight": torch.arange(15.0).view(5, 3), "layer.bias": torch.arange(5.0)}
    save_file(odd, tmp_path / "model" / "odd.safetensors")
    folder = ModelFolder.open(tmp_path / "model")
    plain = mmdit.build(folder, torch.float32, None)
    ranks = run_ranks(load_partitioned, 2, tmp_path / "model")
    whole_bytes = sum(2 * parameter.numel() for parameter in plain.parameters())
    names = mmdit.linear_names(plain, ("attn", "mlp"))
    expected = row_squares_of(plain, names)
    for rank in ranks:
        assert torch.equal(rank["velocity"], forward(plain))
        assert 0 < rank["read"] <= 1.05 * whole_bytes / 2
        assert rank["kept"] <= 1.05 * whole_bytes, "fp32 in memory, half of the elements"
        assert all(torch.equal(rank["squares"][name], expected[name]) for name in names)
    for name in plain.state_dict():
        times_told = ranks[0]["told"][name] + ranks[1]["told"][name]
        assert (times_told == 1).all(), f"{name}: a row was told twice or not at all"
    for rank in ranks:
        assert torch.equal(rank["odd_weight"], odd["layer.weight"])
        assert torch.equal(rank["odd_squares"], odd["layer.weight"].square().sum(1))
    assert (ranks[0]["odd_told"] + ranks[1]["odd_told"]).tolist() == [1.0] * 5
