"""The chosen mode is the fastest that fits, and a run that fits nowhere is told what would."""

import re

import pytest

from ccmdist.errors import ConfigError
from ccmdist.planner.flops import tokens
from ccmdist.planner.memory import memory
from ccmdist.planner.mode import choose_mode, needed, why_not
from tests.unit.planner.planned import PUBLISHED, config

GB = 10**9
OF = tokens(384)


def chosen(num_ranks, ranks_per_node, gpu_gb, *overrides):
    return choose_mode(config(*overrides), PUBLISHED, OF, num_ranks, ranks_per_node, gpu_gb and gpu_gb * GB)


def test_one_gpu_of_80_gb_holds_the_weights_whole():
    mode = chosen(1, 1, 80)
    assert mode.sharding == "replicated"
    assert re.fullmatch(r"the only mode for these settings \(\d\d\.\d of 80 GB by estimate\)", mode.reason)


@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(8, 8), (64, 8), (512, 4)])
def test_where_whole_weights_fit_they_are_not_cut(num_ranks, ranks_per_node):
    mode = chosen(num_ranks, ranks_per_node, 80)
    assert mode.sharding == "replicated"
    assert mode.reason.startswith("the fastest that fits: every GPU holds all frozen weights")


def test_eight_gpus_of_48_gb_cut_what_a_table_does_not_make_small_enough():
    assert chosen(8, 8, 48).sharding == "replicated"
    mode = chosen(8, 8, 48, "tabulate_modulation=false")
    assert mode.sharding == "zero3"
    assert mode.reason.startswith("whole weights do not fit; cut over all GPUs, they are gathered twice")


def test_several_nodes_gather_inside_each_node_if_that_fits():
    mode = chosen(64, 8, 24)
    assert mode.sharding == "zero3_hpz"
    assert "inside the node alone" in mode.reason


def test_only_where_nothing_else_fits_are_weights_gathered_over_the_network():
    needs = needed(config(), PUBLISHED, OF, 64, 2)
    between = (needs["zero3"].total + needs["zero3_hpz"].total) / 2 / GB
    limit = int(needs["zero3_hpz"].total / 0.92) + GB
    assert choose_mode(config(), PUBLISHED, OF, 64, 2, int(between / 0.92 * GB)).sharding == "zero3"
    assert choose_mode(config(), PUBLISHED, OF, 64, 2, limit).sharding == "zero3_hpz"


@pytest.mark.parametrize("gpu_gb", [12, 16, 24, 40, 48, 80, 141])
@pytest.mark.parametrize("ranks", [(8, 8), (16, 8), (64, 8), (64, 4), (64, 1)])
def test_the_choice_fits_and_nothing_faster_does(ranks, gpu_gb):
    try:
        mode = chosen(*ranks, gpu_gb)
    except ConfigError:
        mode = None
    needs = needed(config(), PUBLISHED, OF, *ranks)
    fitting = [sharding for sharding, need in needs.items() if need.fits(gpu_gb * GB)]
    assert (mode.sharding if mode else None) == (fitting[0] if fitting else None)


def test_ranks_on_cpus_share_the_weights():
    mode = chosen(2, 2, None)
    assert (mode.sharding, mode.reason) == ("zero3", "ranks on CPUs share one memory, so the weights are held once")


@pytest.mark.parametrize("base", ["nf4", "int8"])
@pytest.mark.parametrize("gpu_gb", [None, 24, 80])
def test_quantised_weights_are_never_cut(base, gpu_gb):
    assert chosen(8, 8, gpu_gb, f"base={base}").sharding == "replicated"


def test_why_a_mode_makes_no_sense():
    told = {
        ("zero3", 1, 1): "one GPU has nobody to share with",
        ("zero3_hpz", 8, 8): "on one node it is the same as zero3",
        ("zero3_hpz", 8, 1): "with one GPU per node it would hold the weights whole, twice over",
        ("zero3_hpz", 16, 8): None,
        ("zero3", 2, 1): None,
        ("replicated", 1, 1): None,
    }
    assert {case: why_not(config(), *case) for case in told} == told
    assert why_not(config("base=nf4"), "zero3", 8, 8) == "base nf4 cannot be cut over ranks"


def test_what_fits_nowhere_is_refused_with_what_would_fit():
    with pytest.raises(ConfigError) as error:
        chosen(1, 1, 24, "micro_batch_size=4", "global_batch_size=4")
    message, remedy = error.value.message, error.value.remedy
    assert re.fullmatch(
        r"sharding: nothing fits 1 x 24 GB, of which 22\.1 GB can be planned with "
        r"\(estimates: replicated \d\d\.\d GB\)",
        message,
    )
    assert re.match(r"would fit: base=nf4 \(\d\d\.\d GB\); ", remedy)
    assert re.search(r"\d+ GPUs \(\d+\.\d GB\)", remedy)
    for change in ("base=nf4", "base=nf4 micro_batch_size=1"):
        assert change in remedy
        assert chosen(1, 1, 24, "global_batch_size=4", *change.split()).sharding == "replicated"


def test_what_is_said_to_fit_keeps_less_for_the_backward_pass():
    with pytest.raises(ConfigError, match="would fit: activation_checkpointing=full"):
        chosen(1, 1, 48, "activation_checkpointing=none", "micro_batch_size=4", "global_batch_size=4")


def test_nothing_at_all_is_said_too():
    with pytest.raises(ConfigError, match="take GPUs with more memory, or a smaller image_size_px"):
        chosen(1, 1, 1)


def test_a_long_text_counts():
    few, many = tokens(384, num_text=256), tokens(384, num_text=1500)
    short, long = (memory(config(), PUBLISHED, of, "replicated", 1, 1).total for of in (few, many))
    limit = int((short + long) / 2 / 0.92)
    assert choose_mode(config(), PUBLISHED, few, 1, 1, limit).sharding == "replicated"
    with pytest.raises(ConfigError):
        choose_mode(config(), PUBLISHED, many, 1, 1, limit)
