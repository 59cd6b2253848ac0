"""Memory per GPU: exact where it can be, and it moves in the right direction where it is an estimate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccmdist.adapters.injection import inject, row_squares_of
from ccmdist.adapters.named import inject_named
from ccmdist.models import mmdit, quantized
from ccmdist.planner import memory as planned
from ccmdist.planner.flops import tokens
from ccmdist.planner.memory import (
    HEADROOM,
    SHARDINGS,
    activation_bytes,
    cut_bytes,
    is_tabled,
    memory,
    num_trained,
    table_bytes,
    weight_bytes,
)
from ccmdist.planner.transformer import Transformer
from ccmdist.train.engine import zero_config
from tests.unit.planner.planned import PUBLISHED, config, on_meta

OF, BASIC = tokens(384), config()
GB = 1e9


def needs(*overrides, sharding="zero3", num_ranks=8, ranks_per_node=8):
    return memory(config(*overrides), PUBLISHED, OF, sharding, num_ranks, ranks_per_node)


@pytest.mark.parametrize("kind", ["wdlora", "lora"])
def test_the_adapter_has_as_many_values_as_the_injected_one(kind):
    model = on_meta(num_layers=2, num_attention_heads=2).to_empty(device="cpu")
    chosen = config(f"adapter.kind={kind}", "adapter.lora_rank=3")
    names = mmdit.linear_names(model, chosen.adapter.targets)
    adapted = inject(model, names, chosen.adapter, row_squares_of(model, names), 0)
    sizes = Transformer.from_config(dict(model.config))
    assert num_trained(chosen, sizes) == sum(value.numel() for value in adapted.parameters.values())


@pytest.mark.parametrize("kind", ["wdlora", "lora"])
def test_two_adapters_have_as_many_values_as_the_injected_ones(kind):
    model = on_meta(num_layers=2, num_attention_heads=2).to_empty(device="cpu")
    chosen = config(f"adapter.kind={kind}", "adapter.lora_rank=3", "objective={kind: dual}", "data.holes={}")
    names = mmdit.linear_names(model, chosen.adapter.targets)
    adapters = chosen.objective.adapters
    injected = inject_named(model, names, chosen.adapter, row_squares_of(model, names), 0, adapters)
    sizes = Transformer.from_config(dict(model.config))
    values = [value.numel() for adapted in injected.of.values() for value in adapted.parameters.values()]
    assert num_trained(chosen, sizes) == sum(values)


def test_ranks_that_may_grow_take_what_the_largest_take_and_since_when_each_has():
    fixed, growing = (needs("adapter.kind=lora", *more, num_ranks=8) for more in ([], ["adapter.growth={}"]))
    births = 4 * num_trained(config("adapter.kind=lora"), PUBLISHED) / 8
    assert growing.moments - fixed.moments == pytest.approx(births)
    assert growing.total - fixed.total == pytest.approx(births)


def test_weights_of_the_published_model_in_each_form():
    plain, tabled = "tabulate_modulation=false", "tabulate_modulation=true"
    assert weight_bytes(config(plain), PUBLISHED) == 2 * 20_430_401_088
    assert weight_bytes(config(plain, "base=fp32"), PUBLISHED) == 4 * 20_430_401_088
    assert weight_bytes(config(tabled), PUBLISHED) == 2 * PUBLISHED.num_resident_parameters(True)
    assert weight_bytes(config(tabled), PUBLISHED) / GB == pytest.approx(27.2, abs=0.1)
    assert weight_bytes(config("base=int8"), PUBLISHED) / GB == pytest.approx(13.7, abs=0.1)
    assert weight_bytes(config("base=nf4"), PUBLISHED) / GB == pytest.approx(7.1, abs=0.1)


def test_an_adapter_in_the_modulation_keeps_the_table_away():
    assert is_tabled(config(), PUBLISHED)
    assert not is_tabled(config("adapter.targets=[attn,img_mod.1]"), PUBLISHED)
    assert not is_tabled(config("tabulate_modulation=false"), PUBLISHED)


def test_bytes_by_hand_for_one_rank():
    """Rank 1 on every attention and MLP linear but four: 716 linears."""
    chosen = config("adapter.lora_rank=1", "adapter.kind=lora", "micro_batch_size=1")
    d = PUBLISHED.width
    per_block = 8 * 2 * d + 4 * 5 * d
    trained = 60 * per_block - (2 * 2 * d + 2 * 5 * d)
    assert num_trained(chosen, PUBLISHED) == trained
    need = memory(chosen, PUBLISHED, OF, "zero3", 1, 1)
    assert need.weights == weight_bytes(chosen, PUBLISHED)
    assert need.gathered == 0
    assert need.adapter == 8 * trained  # one rank: the partition is whole
    assert need.moments == 8 * trained
    assert need.total == sum(vars(need).values())


def test_each_way_to_cut_the_weights_by_hand():
    matrices, vectors = cut_bytes(config(), PUBLISHED), 2 * PUBLISHED.num_resident_vectors(True)
    assert matrices + vectors == weight_bytes(config(), PUBLISHED)
    found = {s: needs(sharding=s, num_ranks=64, ranks_per_node=8).weights for s in SHARDINGS}
    shares = {"replicated": 1, "zero3_hpz": 1 / 64 + 1 / 8, "zero3": 1 / 64}
    assert found == {mode: vectors + matrices * share for mode, share in shares.items()}


def test_activations_follow_the_coefficients_that_were_measured():
    """50.4 bytes per token, width and block when nothing is computed again: 13.1 GB for one image at 384 px."""
    kept = activation_bytes(config("activation_checkpointing=none"), PUBLISHED, OF)
    assert kept / GB == pytest.approx(13.1, abs=0.1)
    full = activation_bytes(config(), PUBLISHED, OF)
    assert full == pytest.approx((60 * 2 + planned.PEAK["wdlora"]) * 3072 * 1408)


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("recompute", ["full", "selective", "none"])
@settings(max_examples=6)
@given(micro=st.integers(1, 32), power=st.integers(0, 9))
def test_more_gpus_never_need_more_and_larger_micro_batches_never_less(sharding, recompute, micro, power):
    def total(micro, nodes):
        chosen = BASIC.model_copy(update={"activation_checkpointing": recompute, "micro_batch_size": micro})
        return memory(chosen, PUBLISHED, OF, sharding, 8 * nodes, 8).total

    assert total(micro, 2 ** (power + 1)) <= total(micro, 2**power) <= total(micro + 1, 2**power)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_what_is_computed_again_is_not_kept(sharding):
    totals = [needs(f"activation_checkpointing={m}", sharding=sharding).total for m in ("full", "selective", "none")]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


def test_savings_save():
    for saving in ("optim.kind=adamw8bit", "base=nf4", "base=int8", "adapter.kind=lora", "adapter.lora_rank=4"):
        assert needs(saving, sharding="replicated").total < needs(sharding="replicated").total, saving
    for cost in ("optim.ema_decay=0.999", "base=fp32", "tabulate_modulation=false", "data.image_size_px=512"):
        of = tokens(config(cost).data.image_size_px)
        assert memory(config(cost), PUBLISHED, of, "replicated", 8, 8).total > needs(sharding="replicated").total, cost


def test_a_gpu_keeps_some_memory_free():
    need = needs()
    assert need.fits(need.total / (1 - HEADROOM) + 1)
    assert not need.fits(need.total / (1 - HEADROOM) - 1)


def test_the_table_has_a_row_for_each_noise_level():
    """4.42 MB per noise level at the published size, and one more row for clean masks in 2511."""
    assert table_bytes(PUBLISHED, 1) == 2 * (60 * 12 * 3072 + 3072)
    timed = Transformer.from_config({"zero_cond_t": True})
    assert table_bytes(timed, 1000) == table_bytes(PUBLISHED, 1001)


def test_constants_are_those_of_the_code_that_runs():
    zero = zero_config(config(), 1)["zero_optimization"]
    assert zero["reduce_bucket_size"] == planned.REDUCE_BUCKET
    state = quantized.NF4Weight(torch.randn(256, 512), "cpu")._state
    held = 256 * 512 // 2 + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held == planned.NF4_BYTES * 256 * 512
    weight = quantized.Int8Weight(torch.randn(6, 8), "cpu")
    assert sum(buffer.nbytes for buffer in weight.buffers()) == 6 * 8 + 6 * planned.INT8_ROW_BYTES
