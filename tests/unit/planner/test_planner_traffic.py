"""Bytes that a GPU receives, against cases worked out by hand; tests/distributed compares them with DeepSpeed's."""

import pytest

from ccmdist.planner.memory import cut_bytes, num_trained
from ccmdist.planner.traffic import traffic
from tests.unit.planner.planned import PUBLISHED, config


def sent(sharding, num_ranks, *overrides):
    return traffic(config("micro_batch_size=1", "global_batch_size=512", *overrides), PUBLISHED, sharding, num_ranks, 8)


def test_one_gpu_receives_nothing():
    assert sent("zero3", 1).per_step == sent("replicated", 1).per_step == 0


def test_figures_of_zero3_without_a_table():
    """Twice 40.9 GB, less the own part: 71.5 GB on 8 GPUs and 80.4 on 64 (facts of the plan, not of a measurement)."""
    plain = "tabulate_modulation=false"
    assert sent("zero3", 8, plain).weights_per_micro_step / 1e9 == pytest.approx(71.5, abs=0.05)
    assert sent("zero3", 64, plain).weights_per_micro_step / 1e9 == pytest.approx(80.4, abs=0.05)
    assert sent("zero3", 64).weights_per_micro_step / 1e9 == pytest.approx(53.7, abs=0.1)


def test_each_mode_by_hand():
    whole, adapter = cut_bytes(config(), PUBLISHED), 4 * num_trained(config(), PUBLISHED) * 63 / 64
    found = {mode: sent(mode, 64) for mode in ("replicated", "zero3_hpz", "zero3")}
    weights = {"replicated": 0, "zero3_hpz": 2 * whole * 7 / 8, "zero3": 2 * whole * 63 / 64}
    for mode, one in found.items():
        assert one.weights_per_micro_step == weights[mode]
        assert one.gradients_per_micro_step == one.adapter_per_step == adapter
        assert one.num_micro_steps == 8
        assert one.per_step == 8 * (weights[mode] + adapter) + adapter
    assert [one.num_weight_ranks for one in found.values()] == [1, 8, 64]
