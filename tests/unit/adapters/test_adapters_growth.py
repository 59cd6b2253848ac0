"""Ranks that grow: the ratio and its definition, what is not active, who grows, and how wide, and what is kept."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ccmdist.adapters.growth import RankGrowth, active_ranks
from ccmdist.adapters.lora import LoRALinear
from ccmdist.adapters.wdlora import NormClock, WDLoRALinear
from ccmdist.config.train import GrowthSettings, LoRASettings, WDLoRASettings
from ccmdist.errors import ConfigError
from ccmdist.models import mmdit
from tests.unit.adapters.growing import Cut, GrowingRun

WIDTHS = (12, 20, 16, 8)
KIND_NAMES = ("lora_A", "lora_B", "magnitude")
KINDS = {"lora": LoRASettings, "wdlora": WDLoRASettings}
both_kinds = pytest.mark.parametrize("kind", KINDS)


def settings_of(kind, lora_rank=4, alpha=None, **growth):
    return KINDS[kind](lora_rank=lora_rank, alpha=alpha, growth=GrowthSettings(**growth))


def chain(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(i, o).to(dtype) for i, o in itertools.pairwise(WIDTHS)]
    return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])


def task(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(32, width, generator=source).to(dtype) for width in (WIDTHS[0], WIDTHS[-1]))


def loss_of(model, seed=0):
    x, y = task(seed, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def grown_run(kind, dtype=torch.float32, num_steps=12, **optim):
    """A run some of whose layers have grown; its threshold lets some of them and not others."""
    run = GrowingRun(chain(dtype), settings_of(kind, lora_rank=6, every_steps=4, fisher_ratio=1.4, alpha=2.0), **optim)
    for step in range(num_steps):
        run.step(loss_of(run.model, step))
    return run


def expanded(model, active, num_more):
    """The same model with layers that have their active ranks alone, or so many more: A' = [A; K], B' = [B, 0]."""
    model = copy.deepcopy(model)
    for name, rank in active.items():
        old, rank = model.get_submodule(name), rank + num_more
        base = torch.nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
        base.weight, base.bias = old.weight, old.bias
        if isinstance(old, WDLoRALinear):
            new = WDLoRALinear(base, rank, old.scale, old.row_squares, NormClock(), name, 0)
            new.magnitude.data.copy_(old.magnitude)
        else:
            new = LoRALinear(base, rank, old.scale, name, 0)
        new.lora_A.data.copy_(old.lora_A[:rank])
        new.lora_B.data.copy_(old.lora_B[:, :rank])
        model.set_submodule(name, new)
    return model


def fisher_of(model, names, seed):
    """The score of each layer as the paper defines it, by a forward and a backward pass of its own."""
    model.zero_grad()
    loss_of(model, seed).backward()
    modules = {name: model.get_submodule(name) for name in names}
    return {n: float(m.lora_A.grad.square().sum() + m.lora_B.grad.square().sum()) for n, m in modules.items()}


def nothing_seen(run, cut):
    """The growth of ``run`` on these pieces, at the beginning of a window."""
    growth = RankGrowth(run.growth.births, run.settings.lora_rank, run.settings.growth)
    growth.place(cut.pieces, cut.flat())
    zeros = {name: [0.0, 0.0] for name in run.growth.births}
    growth.load_state({"births": run.growth.births, "sums": zeros, "tested": zeros})
    return growth


def one_pass_ratios(run, seed):
    """What growth says of one gradient alone."""
    run.model.zero_grad()
    loss_of(run.model, seed).backward()
    growth = nothing_seen(run, run.cut)
    growth.add(growth.look(run.cut.gradient()), list)
    return {name: 1 + probe / active for name, (probe, active) in growth.state()["sums"].items()}


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ratio_of_one_pass_is_that_of_two_passes_with_layers_that_are_really_expanded(kind, dtype):
    """Measured: 3e-16 apart in fp64 and 2e-7 in fp32, at ratios from 1.13 to 1.29."""
    run = grown_run(kind, dtype)
    active = run.growth.active
    assert len(set(active.values())) > 1, "layers of different rank are compared"
    assert max(active.values()) < run.growth.lora_rank
    before, after = (fisher_of(expanded(run.model, active, num_more), active, seed=99) for num_more in (0, 1))
    for name, ratio in one_pass_ratios(run, seed=99).items():
        assert ratio == pytest.approx(after[name] / before[name], rel=1e-6), name
        assert ratio > 1.01, "a ratio of 1 would agree by itself"


def loaded(run, kind):
    """Another run that has taken up the weights of ``run``, and its state as a checkpoint keeps it."""
    again = GrowingRun(chain(), run.settings)
    modules = run.adapted.modules.items()
    tensors = {n: {k: getattr(m, k) for k in KIND_NAMES if hasattr(m, k)} for n, m in modules}
    again.adapted.load(tensors)
    again.growth.load_state(json.loads(json.dumps(run.growth.state())))
    return again


@both_kinds
def test_growth_changes_no_bit_of_what_the_model_computes_neither_then_nor_after_a_load(kind):
    grows, stays = (GrowingRun(chain(), settings_of(kind, every_steps=4, fisher_ratio=r)) for r in (1.1, 1e9))
    x, _ = task(7)
    for step in range(4):
        grown = grows.step(loss_of(grows.model, step))
        assert not stays.step(loss_of(stays.model, step))
    assert grown
    with torch.no_grad():
        assert torch.equal(grows.model(x), stays.model(x))
        assert torch.equal(loaded(grows, kind).model(x), grows.model(x))
    for run in (grows, stays):
        run.step(loss_of(run.model, 4))
    with torch.no_grad():
        assert not torch.equal(grows.model(x), stays.model(x)), "the new rank learns from then on"


@both_kinds
def test_what_is_not_active_stays_as_it_began_and_counts_nowhere(kind):
    begun = grown_run(kind, num_steps=0)
    run = grown_run(kind, weight_decay=0.1)
    moments = run.optimizer.moments(run.flat)
    for name, rank in run.growth.active.items():
        now, then = run.adapted.modules[name], begun.adapted.modules[name]
        assert torch.equal(now.lora_A[rank:], then.lora_A[rank:])
        assert not now.lora_B[:, rank:].any()
        assert not torch.equal(now.lora_A[:rank], then.lora_A[:rank])
        assert now.lora_B[:, : rank - 1].all(), "what is active has learnt"
        for moment in moments.values():
            assert not run.cut.pieces[f"{name}.lora_A"].of(moment).view_as(now.lora_A)[rank:].any()
            assert not run.cut.pieces[f"{name}.lora_B"].of(moment).view_as(now.lora_B)[:, rank:].any()


def test_the_norm_by_which_gradients_are_clipped_is_that_of_what_is_active():
    run = grown_run("wdlora")
    run.model.zero_grad()
    loss_of(run.model, 99).backward()
    expected = 0.0
    for name, rank in run.growth.active.items():
        module = run.adapted.modules[name]
        parts = (module.lora_A.grad[:rank], module.lora_B.grad[:, :rank], module.magnitude.grad)
        expected += sum(float(part.double().square().sum()) for part in parts)
    gradient = run.cut.gradient()
    whole = float(gradient.double().norm())
    run.growth.look(gradient)
    assert float(gradient.double().norm()) == pytest.approx(math.sqrt(expected), rel=1e-6)
    assert whole > 1.02 * math.sqrt(expected), "the probe would have counted"


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_ranks_that_hold_pieces_decide_alike_and_as_one_that_holds_all(world_size):
    run = grown_run("wdlora")
    expected = one_pass_ratios(run, seed=99)
    alone = run.cut.gradient()
    run.growth.look(alone)
    cuts = [Cut(run.adapted.parameters, world_size, global_rank) for global_rank in range(world_size)]
    gradients = [cut.gradient() for cut in cuts]
    squares = [nothing_seen(run, cut).look(gradient) for cut, gradient in zip(cuts, gradients, strict=True)]
    told = []
    for cut, found in zip(cuts, squares, strict=True):
        nothing_seen(run, cut).add(found, lambda values: told.append(values) or values)
    total = [sum(values) for values in zip(*told, strict=True)]
    ranks = [nothing_seen(run, cut) for cut in cuts]
    for growth, found in zip(ranks, squares, strict=True):
        growth.add(found, lambda values: total)
    assert len({json.dumps(growth.state()) for growth in ranks}) == 1
    for name, (probe, active) in ranks[0].state()["sums"].items():
        assert 1 + probe / active == pytest.approx(expected[name], rel=1e-6)
    for name in run.adapted.parameters:
        parts = [cut.pieces[name].of(gradient) for cut, gradient in zip(cuts, gradients, strict=True)]
        assert torch.equal(torch.cat(parts), run.cut.pieces[name].of(alone)), f"{name}: zero where it is not active"
    assert len({tuple(growth.grow(4)) for growth in ranks}) == 1


@given(
    ratios=st.lists(st.sampled_from([1.0, 1.2, 1.3, 1.31, 2.0, 5.0]), min_size=1, max_size=8),
    spare=st.one_of(st.none(), st.integers(0, 12)),
    start_rank=st.integers(1, 2),
    num_tests=st.integers(1, 5),
)
@examples(max_examples=100)
def test_who_grows_has_the_largest_ratios_and_neither_budget_nor_largest_rank_is_passed(
    ratios, spare, start_rank, num_tests
):
    names = [f"layer.{index}" for index in range(len(ratios))]
    budget = None if spare is None else len(names) * start_rank + spare
    growth = RankGrowth(names, 4, GrowthSettings(start_rank=start_rank, every_steps=2, rank_budget=budget))
    growth.place({}, torch.zeros(1))
    zeros = {name: [0.0, 0.0] for name in names}
    ratio_of = dict(zip(names, ratios, strict=True))
    for test in range(1, num_tests + 1):
        before = growth.active
        sums = {name: [ratio - 1, 1.0] for name, ratio in ratio_of.items()}
        growth.load_state(growth.state() | {"sums": sums})
        assert growth.grow(2 * test - 1) == {}, "no test is due"
        chosen = growth.grow(2 * test)
        after = growth.active
        assert after == {name: rank + (name in chosen) for name, rank in before.items()}
        assert max(after.values()) <= 4
        assert budget is None or sum(after.values()) <= budget
        wanting = {name for name, rank in before.items() if ratio_of[name] >= 1.3 and rank < 4}
        left = len(names) * 4 if budget is None else budget - sum(before.values())
        assert set(chosen) <= wanting
        assert len(chosen) == min(len(wanting), left), "no rank is left over while somebody wants it"
        refused = [ratio_of[name] for name in wanting - set(chosen)]
        assert not refused or not chosen or max(refused) <= min(ratio_of[name] for name in chosen)
        assert growth.state()["sums"] == zeros
        assert all(growth.births[name][-1] == 2 * test for name in chosen)


def test_the_ratio_is_that_of_all_steps_since_the_last_test_and_equal_ones_are_taken_by_name():
    growth = RankGrowth(["b", "a"], 2, GrowthSettings(every_steps=2, fisher_ratio=1.5, rank_budget=3))
    growth.place({}, torch.zeros(1))
    for found in ([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]):  # probe and active of b, then of a
        growth.add(torch.zeros(0), lambda values, found=found: found)
    assert growth.grow(2) == {"a": 1.5}
    assert growth.ratios() == {"b": 1.5}
    assert growth.active == {"b": 1, "a": 2}


def test_a_layer_without_any_gradient_does_not_grow_and_one_with_that_of_the_probe_alone_does():
    growth = RankGrowth(["still", "open"], 2, GrowthSettings(every_steps=1))
    growth.place({}, torch.zeros(1))
    growth.add(torch.zeros(0), lambda values: [0.0, 0.0, 1.0, 0.0])
    assert growth.grow(1) == {"open": math.inf}
    assert growth.ratios() == {"still": 1.0}


def test_what_a_checkpoint_keeps_is_exact_as_json_and_a_run_goes_on_from_it_bit_for_bit():
    straight, stopped = grown_run("wdlora", num_steps=14), grown_run("wdlora", num_steps=10)
    state = json.loads(json.dumps(stopped.growth.state()))
    assert state == stopped.growth.state()
    state["births"] = dict(reversed(state["births"].items()))  # a file need not keep the order of the model
    assert active_ranks({"growth": state}) == stopped.growth.active
    assert active_ranks({}) == {}
    again = grown_run("wdlora", num_steps=0)
    again.adapted.load(
        {n: {k: getattr(m, k) for k in ("lora_A", "lora_B", "magnitude")} for n, m in stopped.adapted.modules.items()}
    )
    with torch.no_grad():
        again.flat.copy_(stopped.flat)
    again.optimizer.set_moments(again.flat, stopped.optimizer.moments(stopped.flat))
    again.optimizer.state[again.flat]["step"].fill_(10.0)
    again.growth.load_state(state)
    assert list(again.growth.active) == list(stopped.growth.active)
    for step in range(10, 14):
        again.step(loss_of(again.model, step))
    assert torch.equal(again.flat, straight.flat)
    assert again.growth.state() == straight.growth.state()
    assert straight.growth.births != stopped.growth.births, "a test lies between"


class Apart(torch.nn.Module):
    """Layers that do not see each other."""

    def __init__(self, num, width):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(num))

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


@both_kinds
@pytest.mark.parametrize("seed", range(3))
def test_most_of_the_rank_that_grows_goes_where_rank_is_needed(kind, seed):
    """Two of six layers need rank 5, the others the 1 with which they start; the authors' threshold and interval.

    Measured: all of the 3 or 4 ranks of each case.
    """
    needs, width = (1, 4), 24
    torch.manual_seed(seed)
    model = Apart(6, width)
    teacher = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(teacher.layers):
            rank = 5 if index in needs else 1
            layer.weight += torch.randn(width, rank) @ torch.randn(rank, width) / (width * rank**0.5)
    run = GrowingRun(model, settings_of(kind, lora_rank=8))
    for _ in range(200):
        x = torch.randn(64, width)
        noise = 0.1 * torch.randn(6, 64, width)
        run.step((run.model(x) - teacher(x) - noise).square().mean())
    grown = [rank - 1 for rank in run.growth.active.values()]
    assert sum(grown) >= 3
    assert sum(grown[index] for index in needs) >= 0.8 * sum(grown)


def test_the_ratio_of_a_layer_that_learns_nothing_but_noise_is_about_two():
    """What the ratio cannot do: it is relative, so beside a B of zero any column looks as good as the one there is."""
    run = GrowingRun(Apart(1, 24), settings_of("lora", lora_rank=8), lr=1e-6)
    source = torch.Generator().manual_seed(0)
    for _ in range(40):
        x, noise = torch.randn(64, 24, generator=source), torch.randn(1, 64, 24, generator=source)
        grown = run.step((run.model(x) - run.model(x).detach() - noise).square().mean())
    assert 1.5 < grown["layers.0"] < 2.5


def test_projections_of_the_text_grow_as_those_of_the_image_do(tiny):
    model = mmdit.build(tiny, torch.float32, None)
    names = mmdit.linear_names(model, ("attn", "mlp"))
    run = GrowingRun(model, LoRASettings(lora_rank=3, growth=GrowthSettings(every_steps=2)), names)
    source = torch.Generator().manual_seed(0)
    latents, mask, target = torch.randn(3, 2, 16, 64, generator=source)
    prompt_embeds = torch.randn(2, 5, model.config.joint_attention_dim, generator=source)
    for _ in range(2):
        velocity = mmdit.velocity(run.model, latents, mask, prompt_embeds, torch.tensor([0.2, 0.9]), (4, 4), (4, 4))
        grown = run.step((velocity - target).square().mean())
    assert min(run.growth.ratios().values()) > 1, "every layer has a probe"
    projections = {name.split(".", 2)[2] for name in grown}
    assert {"attn.to_q", "attn.to_v", "img_mlp.net.2"} <= projections
    assert {"attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out", "txt_mlp.net.2"} <= projections


def test_a_budget_that_is_too_small_is_refused_with_both_numbers():
    growth = GrowthSettings(start_rank=2, rank_budget=7)
    expected = (
        r"^adapter\.growth\.rank_budget: 7 ranks do not suffice for 4 adapted linears of start_rank 2; "
        r"set adapter\.growth\.rank_budget to more than 8, or name fewer adapter\.targets$"
    )
    with pytest.raises(ConfigError, match=expected):
        growth.check_budget(4)
    growth.check_budget(3)
