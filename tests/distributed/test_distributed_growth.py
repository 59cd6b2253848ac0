"""Ranks that grow under real ZeRO-3: what is killed within a window goes on bit for bit, and probes count nowhere."""

import json
import math

import pytest
import torch

from ccmdist.adapters.growth import active_ranks
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.train.checkpoint import committed_paths, newest_valid
from tests.distributed.small_engine import built, steps
from tests.distributed.small_world import losses

pytestmark = pytest.mark.distributed

GROWING = ["adapter.growth.fisher_ratio=1.2", "adapter.growth.every_steps=3", "adapter.growth.rank_budget=80"]
PICTURES = ["monitor.images_every_steps=6", "monitor.num_images=1", "monitor.denoise_steps=2"]
QUANTITIES = ("weight", "exp_avg", "exp_avg_sq")


def state_at_the_end(folder):
    """What the objective keeps, and every whole quantity."""
    checkpoint = newest_valid(folder / "checkpoints")
    names = checkpoint.manifest["parameters"]
    return checkpoint.objective_state, {(n, q): checkpoint.whole(n, q) for n in names for q in QUANTITIES}


def test_a_run_that_is_killed_between_two_tests_resumes_to_the_same_ranks_and_weights(train_ranks):
    folder, settings = train_ranks.folder, [*GROWING, *PICTURES]
    assert train_ranks("straight", 2, *settings) == [0, 0]
    assert train_ranks("killed", 2, *settings, fault="sigkill@step:rank=1,step=4")[1] == -9
    kept = newest_valid(folder / "killed" / "checkpoints").objective_state["growth"]
    assert newest_valid(folder / "killed" / "checkpoints").step == 4
    assert max(active_ranks({"growth": kept}).values()) == 2, "some have grown"
    assert all(active > 0 for _, active in kept["sums"].values()), "within a window"
    assert train_ranks("killed", 2, *settings) == [0, 0]
    (expected_state, expected), (state, found) = (state_at_the_end(folder / name) for name in ("straight", "killed"))
    assert state == expected_state
    assert {steps[-1] for steps in state["growth"]["births"].values()} == {0, 3, 6}, "a second test came after"
    assert found.keys() == expected.keys()
    for place, values in expected.items():
        assert torch.equal(found[place], values), place
    for tag in ("loss/mean", "optim/grad_norm", "lora_ranks/total", "lora_ranks/max", "lora_ranks/fisher_ratio"):
        assert losses(folder / "killed", tag) == losses(folder / "straight", tag), tag
    grown = next(name for name, births in state["growth"]["births"].items() if births == [0, 3])
    assert losses(folder / "straight", f"lora_rank/{grown}") == [(1, 1.0), (3, 2.0)]
    assert pictures(folder / "straight") == {"lora_rank/map": [0, 6], "samples/mask_real_sampled": [0, 6]}


def pictures(folder):
    """Name -> steps of the pictures of a run, without that of the first batch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if not tag.startswith("first_batch")]
    return {tag: [event.step for event in events.Images(tag)] for tag in tags}


def test_other_numbers_of_ranks_let_the_same_layers_grow(train_ranks):
    folder, settings = train_ranks.folder, ["adapter.kind=lora", *GROWING]
    assert train_ranks("alone", 1, *settings) == [0]
    for world_size, fault in ((2, "sigusr2@step:rank=0,step=3"), (1, "")):
        assert train_ranks("moved", world_size, *settings, fault=fault) == [0] * world_size
    (expected, _), (found, _) = (state_at_the_end(folder / name) for name in ("alone", "moved"))
    assert found["growth"]["births"] == expected["growth"]["births"]
    for name, pair in expected["growth"]["tested"].items():
        assert found["growth"]["tested"][name] == pytest.approx(pair, rel=1e-3), name


def growing_and_plain(group, world):
    """Losses and norms of steps before the first test, of a run whose ranks may grow and of one of its start rank."""
    told = []
    for more in (["adapter.lora_rank=4", "adapter.growth.start_rank=2"], ["adapter.lora_rank=2"]):
        overrides = [
            "adapter.kind=lora",
            "adapter.alpha=2",
            "optim.weight_decay=0.1",
            "optim.max_grad_norm=0.01",
            *more,
        ]
        config, objective, engine = built(group, world, *overrides)
        told.append(steps(config, objective, engine, 0, 4))
    return told


def test_until_the_first_test_a_run_is_that_of_its_start_rank_and_its_norm_too(run_ranks, world):
    for growing, plain in run_ranks(growing_and_plain, 2, str(world)):
        for (loss, norm), (expected_loss, expected_norm) in zip(growing, plain, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == (expected_norm and pytest.approx(expected_norm, rel=1e-4))
        assert any(norm and norm > 0.01 for _, norm in plain), "gradients were clipped"


def with_a_lost_step(group, world):
    """State before and after a step whose loss is not finite, and after one more."""
    config, objective, engine = built(group, world, *GROWING)
    steps(config, objective, engine, 0, 2)
    before = json.dumps(objective.growth.state())
    loss, objective.loss = objective.loss, lambda model, batch: loss(model, batch) * math.nan
    (*_, (_, norm)) = steps(config, objective, engine, 2, 3)
    lost = json.dumps(objective.growth.state()), engine.adam_steps()
    objective.loss = loss
    steps(config, objective, engine, 3, 4)
    return before, lost, norm, engine.adam_steps(), objective.growth.state()


def test_a_step_that_no_rank_could_take_counts_neither_for_the_ratio_nor_for_the_time_of_a_test(run_ranks, world):
    for before, (after, adam_steps), norm, then, state in run_ranks(with_a_lost_step, 1, str(world)):
        assert not math.isfinite(norm)
        assert after == before
        assert adam_steps == {"adapter": 2}
        assert then == {"adapter": 3}
        assert {births[-1] for births in state["births"].values()} == {0, 3}


def test_a_checkpoint_of_ranks_that_grow_is_not_taken_up_without_and_a_small_budget_is_refused(train_ranks):
    folder, allowed = train_ranks.folder, [setting.partition("=")[0] for setting in GROWING]
    assert train_ranks("r", 1, "num_steps=2", *GROWING) == [0]
    assert train_ranks("r", 1, "num_steps=2", allow=[*allowed, "adapter.growth.start_rank"]) == [78]
    reason = RunDirectory(folder / "r").outcome().reason
    assert "step-00000002: was trained with ranks that grow, this run has ranks that do not grow" in reason
    assert "restore adapter.growth, or choose another run folder" in reason
    assert train_ranks("s", 1, "adapter.growth.rank_budget=43") == [78]
    assert "rank_budget: 43 ranks do not suffice for 44 adapted linears" in RunDirectory(folder / "s").outcome().reason
    assert committed_paths(folder / "s" / "checkpoints") == []
