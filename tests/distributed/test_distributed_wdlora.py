"""WDLoRA under ZeRO-3 against a plain loop: weights may be partitioned again between forward and backward."""

import pytest
import torch

from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig

pytestmark = pytest.mark.distributed

NUM_STEPS, LR = 3, 1e-2
SIGMA, HW = 0.5, (4, 4)


def loss_of(model, rank, step):
    """Loss of one micro-batch, which depends on its rank and step alone."""
    from ccmdist.models import mmdit

    source = torch.Generator().manual_seed(10 * step + rank)
    latents = torch.randn(2, 1, 16, 64, generator=source)
    prompt_embeds = torch.randn(1, 5, 64, generator=source)
    predicted = mmdit.velocity(model, latents[0], latents[1], prompt_embeds, torch.tensor([SIGMA]), HW, HW)
    return predicted.square().mean()


def adapted(folder, zero_config, recompute):
    """The tiny model with an adapter; partitioned if asked for."""
    from ccmdist.adapters.injection import RowSquares, inject
    from ccmdist.config.train import WDLoRASettings
    from ccmdist.models import mmdit

    names = mmdit.linear_names(mmdit.skeleton(folder), ("attn", "mlp"))
    squares = RowSquares(names)
    model = mmdit.build(folder, torch.float32, zero_config, squares.on_rows).requires_grad_(False)
    collected = squares.reduce() if zero_config is not None else {name: squares._whole(name) for name in names}
    linears = inject(model, names, WDLoRASettings(lora_rank=4), collected, seed=0)
    model.train()
    if recompute:
        model.enable_gradient_checkpointing()
    return model, linears


def partitioned(group, path, recompute):
    """Losses, gradient norms and final magnitudes and matrices of this rank's slices, trained by the engine."""
    from ccmdist.models import mmdit
    from ccmdist.models.model_folder import ModelFolder
    from ccmdist.train.engine import Engine, zero_config

    overrides = [f"data.{name}={path}" for name in ("shards", "model", "cache")]
    overrides += ["run=unused", "global_batch_size=2", "base=fp32", "optim.betas=[0.9,0.99]"]
    config = load(TrainConfig, [], overrides)
    model, linears = adapted(ModelFolder.open(path), zero_config(config, group.ranks.world_size), recompute)
    mmdit.make_blocks_leaves(model)
    engine = Engine(model, {"adapter": linears.parameters}, config, group)
    told = []
    for step in range(NUM_STEPS):
        engine.begin_step(frozenset({"adapter"}), LR)
        loss = loss_of(engine.module, group.ranks.global_rank, step)
        engine.backward(loss)
        told.append((float(loss), engine.step()))
        linears.advance()
    slices = {name: (local.start, local.values["weight"].clone()) for name, local in engine.local.items()}
    return told, slices


def plain(path):
    """The same of both ranks' micro-batches by one ordinary optimizer."""
    from ccmdist.models.model_folder import ModelFolder

    model, linears = adapted(ModelFolder.open(path), None, recompute=False)
    optimizer = torch.optim.AdamW(linears.parameters.values(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
    told = []
    for step in range(NUM_STEPS):
        losses = [loss_of(model, rank, step) for rank in range(2)]
        (sum(losses) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(linears.parameters.values(), 1.0)
        told.append(([float(loss.detach()) for loss in losses], float(norm)))
        optimizer.step()
        optimizer.zero_grad()
        linears.advance()
    return told, {name: parameter.detach().flatten() for name, parameter in linears.parameters.items()}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    from ccmdist.models.make import make_model

    path = tmp_path_factory.mktemp("model")
    make_model("tiny", "2509", path)
    return path


@pytest.mark.parametrize("recompute", [False, True])
def test_two_ranks_train_as_one_plain_process_does(run_ranks, model_path, recompute):
    expected, parameters = plain(model_path)
    assert expected[0][1] > 1e-3
    for rank, (told, slices) in enumerate(run_ranks(partitioned, 2, model_path, recompute)):
        for (loss, norm), (losses, expected_norm) in zip(told, expected, strict=True):
            assert loss == pytest.approx(losses[rank], rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
        assert slices.keys() == parameters.keys()
        for name, (start, values) in slices.items():
            whole = parameters[name]
            torch.testing.assert_close(values, whole[start : start + len(values)], rtol=1e-3, atol=1e-4, msg=name)
