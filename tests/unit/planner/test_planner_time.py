"""Predicted times follow from operations, bytes and stated rates; a run comes back as often as its limit demands."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.errors import ConfigError
from ccmdist.planner.flops import step_flops, tokens
from ccmdist.planner.hardware import FABRICS, GPUS, Machine
from ccmdist.planner.plan import plan
from ccmdist.planner.scaling import scaling
from ccmdist.planner.time import SETUP_S, finish, startup_bytes, step_time
from ccmdist.planner.traffic import traffic
from tests.unit.planner.planned import PUBLISHED, config

OF = tokens(384)
ACADEMIC = Machine("h200", "nvlink-2x200g", 64, 8)


def batch(micro, num_gpus, *overrides):
    return config(f"micro_batch_size={micro}", f"global_batch_size={micro * num_gpus}", *overrides)


def test_a_step_that_sends_nothing_takes_its_operations_by_the_rate():
    chosen = batch(8, 1, "adapter.kind=lora")
    step = step_time(chosen, PUBLISHED, OF, "replicated", Machine("h200", "nvlink-8x400g", 1, 1, efficiency=0.5))
    operations = step_flops(PUBLISHED, OF, 16, ("attn", "mlp"), "full", is_tabled=True).executed
    assert step.compute_s == pytest.approx(8 * operations / (0.5 * 989.4e12))
    assert step.send_s == 0
    assert step.overlapped_s == step.in_turn_s == step.compute_s + step.update_s


def test_a_ring_over_several_nodes_is_as_fast_as_the_network_of_a_node():
    """Two 200 Gbit/s adapters, 90 % of them: 45 GB/s; inside a node 80 % of 450 GB/s."""
    assert ACADEMIC.bytes_per_s(64) == pytest.approx(45e9)
    assert ACADEMIC.bytes_per_s(8) == pytest.approx(360e9)
    assert Machine("l40s", "pcie-1x100g", 8, 4).bytes_per_s(4) == 20e9


def test_zero3_on_an_academic_network_by_hand():
    chosen = batch(1, 64)
    step = step_time(chosen, PUBLISHED, OF, "zero3", ACADEMIC)
    sent = traffic(chosen, PUBLISHED, "zero3", 64, 8)
    assert step.send_s == pytest.approx((sent.weights_per_micro_step + sent.gradients_per_micro_step) / 45e9)
    assert step.overlapped_s == pytest.approx(step.send_s + step.update_s)


@pytest.mark.parametrize("micro", [1, 4, 16])
def test_from_the_break_even_on_computing_takes_longer(micro):
    step = step_time(batch(micro, 64), PUBLISHED, OF, "zero3", ACADEMIC)
    assert (micro >= step.break_even) == (step.compute_s >= step.send_s)
    assert step_time(batch(1, 64), PUBLISHED, OF, "zero3", ACADEMIC).break_even == pytest.approx(step.break_even)


@pytest.mark.parametrize("fabric", ["nvlink-8x400g", "nvlink-2x200g", "nvlink4-1x200g"])
def test_the_order_of_the_modes_is_the_order_of_speed(fabric):
    machine = Machine("h100", fabric, 64, FABRICS[fabric].gpus_per_node)
    times = [step_time(batch(1, 64), PUBLISHED, OF, s, machine).in_turn_s for s in ("replicated", "zero3_hpz", "zero3")]
    assert times == sorted(times)


@settings(max_examples=50)
@given(limit_min=st.integers(1, 3000), num_steps=st.integers(1, 20000))
def test_a_run_starts_as_often_as_its_limit_demands(limit_min, num_steps):
    chosen = BASIC.model_copy(update={"num_steps": num_steps})
    course = finish(chosen, PUBLISHED, STEP, "replicated", ALONE, 60 * limit_min, 300)
    step_s = STEP.overlapped_s + STEP.monitor_s
    usable_s = 60 * limit_min - 300 - SETUP_S - startup_bytes(chosen, PUBLISHED, "replicated", ALONE) / 5e9
    if usable_s < step_s:
        assert course is None
    else:
        assert course.num_starts == math.ceil(num_steps / int(usable_s / step_s))
        assert course.total_s == pytest.approx(num_steps * step_s + course.num_starts * course.startup_s)


ALONE = Machine("h100", "nvlink-8x400g", 1, 1)
BASIC = batch(4, 1)
STEP = step_time(BASIC, PUBLISHED, OF, "replicated", ALONE)


def test_a_start_reads_what_its_nodes_ranks_hold():
    plain = config("tabulate_modulation=false")
    machine = Machine("h100", "nvlink-8x400g", 64, 8)
    whole = 2 * 20_430_401_088
    assert startup_bytes(plain, PUBLISHED, "replicated", machine) == whole
    assert startup_bytes(plain, PUBLISHED, "zero3", machine) == whole / 8
    tabled = startup_bytes(config(), PUBLISHED, "replicated", machine)
    # 425 rows of 4.42 MB; beside fp32, 1000.
    assert tabled == pytest.approx(2 * PUBLISHED.num_resident_parameters(True) + 1.88e9, rel=1e-3)


def test_four_bits_cost_time_in_every_pass():
    alone = [step_time(batch(1, 1, f"base={b}"), PUBLISHED, OF, "replicated", ALONE).compute_s for b in ("bf16", "nf4")]
    assert alone[0] < alone[1] < 2 * alone[0]


@pytest.mark.parametrize("num_gpus", [1, 2, 64, 4096])
def test_plans_for_one_to_4096_gpus(num_gpus):
    found = plan(batch(4, num_gpus), {}, Machine("h100", "nvlink-8x400g", num_gpus, min(8, num_gpus)))
    assert found.sharding == "replicated"
    assert found.chosen.images_per_s / num_gpus == pytest.approx(6, abs=0.5)
    assert found.as_json()["choices"][0]["memory"]["total"] == found.chosen.memory.total


def test_a_batch_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ConfigError) as error:
        plan(config("micro_batch_size=4", "global_batch_size=300"), {}, Machine("h100", "nvlink-8x400g", 64, 8))
    assert str(error.value) == (
        "global_batch_size 300: 64 GPUs with micro_batch_size 4 need a multiple of 256; "
        "use global_batch_size=256 or 512, or fewer --gpus"
    )


def test_a_mode_that_is_set_is_planned_even_if_it_does_not_fit():
    found = plan(batch(1, 8, "sharding=replicated"), {}, Machine("rtx4090", "pcie-1x200g", 8, 8))
    assert (found.sharding, found.reason, found.chosen.is_fitting) == ("replicated", "as set", False)


def test_a_mode_that_is_set_is_planned_as_training_carries_it_out():
    set_, nvlink = batch(1, 8, "sharding=zero3_hpz"), "nvlink-8x400g"
    found = plan(set_, {}, Machine("h100", nvlink, 8, 8))
    assert (found.sharding, found.reason) == ("zero3", "zero3_hpz was set; on a single node that is the same")
    assert plan(set_, {}, Machine("h100", nvlink, 8, 4)).sharding == "zero3_hpz"
    with pytest.raises(ConfigError, match="each node has one rank"):
        plan(set_, {}, Machine("h100", nvlink, 8, 1))


def test_efficiencies_lie_between_nothing_and_one_and_fall_with_the_number_of_gpus():
    rows = scaling(config("micro_batch_size=4", "global_batch_size=4"), {}, "h200")
    assert {row.num_gpus for row in rows} == {8, 64, 512}
    assert all(0 < row.in_turn <= row.overlapped <= 1 for row in rows)
    by_mode = {}
    for row in rows:
        by_mode.setdefault((row.fabric, row.sharding), []).append(row.in_turn)
    assert all(values == sorted(values, reverse=True) for values in by_mode.values())
    assert min(row.overlapped for row in rows if row.sharding == "replicated") > 0.9


@pytest.mark.parametrize("gpu", GPUS)
def test_every_gpu_can_be_planned_with_and_says_where_its_figures_are_from(gpu):
    rows = scaling(config("base=nf4"), {}, gpu)
    assert rows
    assert {FABRICS[row.fabric].has_nvlink for row in rows} == {GPUS[gpu].nvlink_bytes_per_s > 0}
    assert "NVIDIA" in GPUS[gpu].source


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (("h20", "nvlink-8x400g", 8, 8), "--gpu: 'h20' is no GPU that is known here; did you mean 'h200'?"),
        (("H100", "nvlink-8x400g", 8, 8), "--gpu: 'H100' is no GPU that is known here; did you mean 'h100'?"),
        (("mi300", "nvlink-8x400g", 8, 8), "--gpu: 'mi300' is no GPU that is known here; choose of h100, "),
        (("h100", "nvlink-8x40g", 8, 8), "--fabric: 'nvlink-8x40g' is no fabric that is known here; did you mean"),
        (("l40s", "nvlink-8x400g", 8, 8), "--fabric nvlink-8x400g: l40s has no NVLink; choose of pcie-1x200g, "),
        (("h100", "nvlink-8x400g", 12, 8), "--gpus 12: is no multiple of the 8 GPUs of a node; give --gpus-per-node"),
    ],
)
def test_a_machine_that_cannot_be_is_refused(machine, expected):
    with pytest.raises(ConfigError) as error:
        Machine(*machine)
    assert str(error.value).startswith(expected)
