"""WDLoRA through the real engine: one norm evaluation per step, the base bit for bit at the start, no frozen m."""

import json
from pathlib import Path

import pytest
import torch

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from tests.distributed.small_world import SETTINGS, data_overrides, losses, weights

pytestmark = pytest.mark.distributed

NUM_STEPS = 3
ACCUMULATED = [f"num_steps={NUM_STEPS}", "activation_checkpointing=full"]


def count_evaluations(rank):
    """Let the process write down how often each layer has evaluated its norms."""
    from ccmdist.adapters.wdlora import RowState
    from ccmdist.train.objectives.edit import EditObjective

    evaluations = []
    original, describe = RowState.evaluate.__func__, EditObjective.describe

    def evaluate(cls, W, A, B, m, base_squares, scale):
        evaluations.append(base_squares.data_ptr())
        return original(cls, W, A, B, m, base_squares, scale)

    def counting(self):
        counts = [evaluations.count(layer) for layer in set(evaluations)]
        (self.config.run.parent / "counts.json").write_text(json.dumps([counts, len(self.adapted.modules)]))
        return describe(self)

    RowState.evaluate = classmethod(evaluate)
    EditObjective.describe = counting


def evaluate_always(rank):
    """Let every forward and every recompute evaluate the norms again."""
    from ccmdist.adapters.frozen import dense
    from ccmdist.adapters.wdlora import RowState, WDLoRALinear

    def row_state(self):
        self.rows = RowState.evaluate(
            dense(self.weight), self.lora_A, self.lora_B, self.magnitude, self.row_squares, self.scale
        )
        return self.rows

    WDLoRALinear.row_state = row_state


def test_norms_are_evaluated_once_per_step_and_nothing_changes_by_that(train_ranks):
    """Four accumulations, recompute on; validation at the start shares the evaluation of the first step."""
    folder = train_ranks.folder
    assert train_ranks("once", 1, *ACCUMULATED, patch=count_evaluations) == [0]
    counts, num_layers = json.loads((folder / "counts.json").read_text())
    assert counts == [NUM_STEPS] * num_layers
    assert train_ranks("always", 1, *ACCUMULATED, patch=evaluate_always) == [0]
    once, always = weights(folder / "once"), weights(folder / "always")
    assert once.keys() == always.keys()
    assert all(torch.equal(once[name], always[name]) for name in once)
    for tag in ("loss/mean", "held_out/mean"):
        assert losses(folder / "once", tag) == losses(folder / "always", tag)


def velocities_with_and_without(group, world, dtype):
    """The base's prediction by itself, and through the engine with an untrained adapter."""
    from ccmdist.models import mmdit
    from ccmdist.train.engine import Engine, zero_config
    from ccmdist.train.objectives.edit import EditObjective

    overrides = ["run=unused", *data_overrides(Path(world)), *SETTINGS, f"base={dtype}", "sharding=zero3"]
    config = load(TrainConfig, [], overrides)
    objective = EditObjective(config, group)
    batch = next(iter(objective.batches(0)))
    noise = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    sigma = objective.grid[500:501]
    with torch.no_grad():
        plain = mmdit.build(objective.folder, objective.dtype, None)
        expected = objective._velocity(plain, batch, noise, sigma)
        model = objective.build(zero_config(config, group.ranks.world_size))
        engine = Engine(model, objective.parameter_sets(), config, group)
        found = objective._velocity(engine.module, batch, noise, sigma)
    assert {str(p.dtype) for p in objective.adapted.parameters.values()} == {"torch.float32"}
    assert found.dtype == objective.dtype
    return expected, found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_untrained_adapter_gives_the_base_bit_for_bit_through_the_engine(run_ranks, world, dtype):
    for expected, found in run_ranks(velocities_with_and_without, 2, str(world), dtype):
        assert torch.equal(expected, found)


def test_a_magnitude_that_cannot_move_is_told_instead_of_trained_on(train_ranks):
    assert train_ranks("frozen", 1, "num_steps=20", "optim.lr=1e-12", "validation.every_steps=100") == [78]
    reason = RunDirectory(train_ranks.folder / "frozen").outcome().reason
    assert reason.startswith("not one magnitude has moved in 10 updates")
    assert "raise optim.lr" in reason
