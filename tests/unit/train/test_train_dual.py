"""Two adapters in training: whose turn a step is, what completion sees and learns, what is told of each."""

import math
from fractions import Fraction
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ccmdist.adapters.injection import row_squares_of
from ccmdist.config.loading import load
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.holes import hole_tokens, unpacked
from ccmdist.data.stream import collated
from ccmdist.diffusion import flow
from ccmdist.errors import CacheError, ConfigError, RunError
from ccmdist.models import mmdit
from ccmdist.train.objectives.dual import DualObjective, adapter_of_step
from tests.distributed.small_world import IMAGE_SIZE_PX
from tests.unit.train.asked_model import Asked, OneRank
from tests.unit.train.uneven_prompts import make_uneven_world, train_config

HOLES = ["data.holes.per_sample=3", "data.holes.shapes=[rectangle,quadrant]"]
DUAL = [*HOLES, "objective.kind=dual", "adapter.lora_rank=2", "adapter.targets=[attn.to_q,img_mlp.net.2]"]
NUM_TOKENS = 4 * 4
SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("holed")
    make_uneven_world(folder, *HOLES)
    return folder


def built(folder, *overrides):
    """The objective with its two adapters on the tiny model, without ZeRO-3 around it."""
    objective = DualObjective(train_config(folder, *DUAL, *overrides), OneRank())
    model = mmdit.build(objective.folder, torch.float32, None).requires_grad_(False)
    names = mmdit.linear_names(model, objective.config.adapter.targets)
    objective._inject(model, names, row_squares_of(model, names))
    return objective, model


@pytest.fixture(scope="module")
def made(folder):
    return built(folder)


def batch_of(objective, adapter, whole=False):
    """A micro-batch of a step that trains ``adapter``; with holes that are everything if asked for."""
    wanted = (batch for batch in objective.batches(0) if objective.sets_of_step(batch["step"]) == {adapter})
    batch = next(wanted)
    return batch | {"holes": torch.full_like(batch["holes"], 255)} if whole else batch


def posed(objective, batch, adapter):
    objective.named.activate(adapter)
    return objective._posed(batch, batch["positions"])


@given(
    seed=st.integers(0, 1000),
    first=st.integers(0, 10**7),
    num_steps=st.integers(1, 50),
    fraction=st.floats(0.01, 0.99),
)
def test_in_any_window_completion_has_its_share_of_steps_to_one_step(seed, first, num_steps, fraction):
    both = DualSettings(completion_fraction=fraction)
    found = [adapter_of_step(seed, step, both) for step in range(first, first + num_steps)]
    share = Fraction(fraction) * num_steps
    assert found.count("completion") in (math.floor(share), math.ceil(share))
    assert found == [adapter_of_step(seed, step, both) for step in range(first, first + num_steps)]


def test_where_two_adapters_have_equal_shares_they_alternate_and_the_seed_says_which_is_first():
    begins = {seed: [adapter_of_step(seed, step, DualSettings()) for step in range(4)] for seed in range(20)}
    assert {tuple(found) for found in begins.values()} == {
        ("completion", "synthesis") * 2,
        ("synthesis", "completion") * 2,
    }


@pytest.mark.parametrize("alone", ["synthesis", "completion"])
def test_an_adapter_that_is_trained_alone_has_every_step(alone):
    single = DualSettings(adapters=(alone,), completion_fraction=0.1)
    assert {adapter_of_step(3, step, single) for step in range(100)} == {alone}


def test_completion_is_shown_structure_and_holed_image_and_around_the_hole_what_is_known(folder):
    objective, model = DualObjective(train_config(folder, *DUAL), OneRank()), Asked()
    objective.named = built(folder)[0].named
    for batch in islice(objective.batches(0), 8):
        objective.loss(model, batch)
        call = model.calls.pop()
        target, *conditions = call["hidden_states"].split(NUM_TOKENS, dim=1)
        assert torch.equal(conditions[0], flow.pack_latents(batch["mask_latents"]))
        assert call["img_shapes"] == [[(1, 4, 4)] * (1 + len(conditions))] * 2
        if objective.sets_of_step(batch["step"]) == {"synthesis"}:
            assert len(conditions) == 1
            continue
        for row, position in enumerate(batch["positions"]):
            holed = flow.pack_latents(batch["holed_latents"][row])
            variants = [index for index in range(3) if torch.equal(holed[index], conditions[1][row])]
            assert len(variants) == 1, "the second condition is not one of the sample's holed images"
            is_open = hole_tokens(unpacked(batch["holes"][row, variants[0]], IMAGE_SIZE_PX))
            noise, sigma = objective._draw(position, (NUM_TOKENS, 64))
            image = flow.pack_latents(batch["image_latents"][row : row + 1])[0]
            for known, clean in ((is_open, image), (~is_open, holed[variants[0]])):
                seen = (1 - sigma) * clean[known] + sigma * noise[known]
                torch.testing.assert_close(target[row][known], seen, rtol=0, atol=1e-6)


def test_every_hole_of_a_sample_is_learnt_from_in_the_course_of_a_run(made):
    objective, _ = made
    drawn = [objective._hole_of(position, 3) for position in range(300)]
    assert all(70 < drawn.count(index) < 130 for index in range(3))
    assert {objective._hole_of("k00", 3) for _ in range(5)} == {objective._hole_of("k00", 3)}


def test_the_loss_of_completion_looks_into_the_hole_alone(made):
    objective, model = made
    batch = batch_of(objective, "completion")
    is_open = posed(objective, batch, "completion")["is_open"].view(2, 1, 4, 4)
    is_open = is_open.repeat_interleave(2, -2).repeat_interleave(2, -1)
    assert 0 < is_open.float().mean() < 1
    with torch.no_grad():
        loss = objective.loss(model, batch)
        outside = batch["image_latents"] + 5.0 * ~is_open
        assert torch.equal(objective.loss(model, batch | {"image_latents": outside}), loss)
        inside = batch["image_latents"] + 5.0 * is_open
        assert objective.loss(model, batch | {"image_latents": inside}) > loss + 1


def test_held_out_losses_of_completion_are_plain_means_in_the_hole(made):
    objective, _ = made
    seen = posed(objective, batch_of(objective, "completion"), "completion")
    errors_BSC = torch.rand(2, NUM_TOKENS, 64)
    expected = [errors[is_open].mean() for errors, is_open in zip(errors_BSC, seen["is_open"], strict=True)]
    torch.testing.assert_close(objective._held_out_loss_B(errors_BSC, seen), torch.stack(expected))


def test_a_hole_that_is_everything_is_plain_synthesis_with_a_second_condition(made):
    objective, model = made
    entry = objective.cache.entries("val")[0]
    batch = collated(objective.cache, [entry]) | {"positions": [entry.key]}
    batch["holes"] = torch.full_like(batch["holes"], 255)
    whole = posed(objective, batch, "completion")
    x_BSC, noise_BSC = flow.pack_latents(batch["image_latents"]), torch.randn(1, NUM_TOKENS, 64)
    sigma_B = torch.tensor([0.6])
    with torch.no_grad():
        errors = objective._errors_BSC(model, whole, flow.pack_latents(whole["image_latents"]), noise_BSC, sigma_B)
        found = objective._held_out_loss_B(errors, whole)
        conditions = torch.cat([flow.pack_latents(batch["mask_latents"]), flow.pack_latents(whole["holed_latents"])], 1)
        noisy = flow.interpolate(x_BSC, noise_BSC, sigma_B)
        predicted = mmdit.velocity(model, noisy, conditions, batch["prompt_embeds"], sigma_B, (4, 4), (4, 4))
    torch.testing.assert_close(found, (predicted - (noise_BSC - x_BSC)).square().mean(dim=(1, 2)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("adapter", ["synthesis", "completion"])
def test_the_loss_is_the_one_that_loops_over_samples_and_tokens_give(folder, adapter):
    objective, model = built(folder, "objective.min_snr_gamma=2", "objective.layout_weight=3")
    batch = batch_of(objective, adapter)
    seen = posed(objective, batch, adapter)
    mean_weight = sum(
        float(share) * min((1 - float(sigma)) ** 2, 2 * float(sigma) ** 2)
        for share, sigma in zip(flow.sigma_shares("logit_normal", objective.grid), objective.grid, strict=True)
    )
    losses = []
    with torch.no_grad():
        found = objective.loss(model, batch)
        for row, position in enumerate(batch["positions"]):
            x = flow.pack_latents(seen["image_latents"])[row]
            noise, sigma = objective._draw(position, x.shape)
            one = {name: values[row : row + 1] for name, values in seen.items() if isinstance(values, torch.Tensor)}
            noisy = flow.interpolate(x[None], noise[None], sigma[None])
            errors = (objective._velocity(model, one, noisy, sigma[None])[0] - (noise - x)).square().mean(dim=1)
            shares = batch["layout"][row].flatten() / 255
            weights = [(1 + 3 * float(shares[s])) * bool(seen["is_open"][row, s]) for s in range(NUM_TOKENS)]
            weighted = sum(weight * float(error) for weight, error in zip(weights, errors, strict=True)) / sum(weights)
            losses.append(min((1 - float(sigma)) ** 2, 2 * float(sigma) ** 2) / mean_weight * weighted)
    assert float(found) == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.parametrize("kind", ["logit_normal", "uniform"])
def test_weights_of_noise_levels_have_mean_1_over_what_a_run_draws(folder, kind):
    objective = DualObjective(train_config(folder, *DUAL, f"sigma_sampling={kind}"), OneRank())
    source = torch.Generator().manual_seed(0)
    drawn = torch.stack([flow.draw_sigma(kind, objective.grid, source) for _ in range(20_000)])
    weights = objective._sigma_weight_B(drawn)
    assert float(weights.mean()) == pytest.approx(1, abs=4 * float(weights.std()) / 20_000**0.5)
    plain = DualObjective(train_config(folder, *DUAL, "objective.min_snr_gamma=null"), OneRank())
    assert torch.equal(plain._sigma_weight_B(drawn), torch.ones(20_000))


def test_held_out_losses_are_told_for_each_adapter_and_depend_on_no_step(made):
    objective, model = made
    with torch.no_grad():
        first = objective.validate(model)
        objective.loss(model, batch_of(objective, "completion"))
        assert objective.validate(model) == first
    names = {
        f"{adapter}/{name}" for adapter in objective.named.of for name in ("mean", *(f"sigma_{s}" for s in SIGMAS))
    }
    assert first.keys() == names | {"mean"}
    assert first["mean"] == (first["synthesis/mean"] + first["completion/mean"]) / 2


def test_pictures_of_completion_keep_what_is_known_and_fill_the_rest(folder, monkeypatch):
    objective, model = built(folder, "monitor.denoise_steps=2", "monitor.num_images=3")
    grids = []
    monkeypatch.setattr(objective, "_decoded_grid", lambda rows: grids.append(rows) or torch.zeros(1, 1))
    assert list(objective.images(model)) == [
        "samples/synthesis_structure_real_sampled",
        "samples/completion_structure_holed_real_filled",
    ]
    assert [len(row) for rows in grids for row in rows] == [3] * 3 + [4] * 3
    (name,) = objective.first_batch_images()
    assert name.startswith(f"first_batch/{adapter_of_step(objective.config.seed, 0, objective.settings)}_structure_")
    assert {len(row) for row in grids[2]} == {4 if "holed" in name else 3}
    for _, holed, real, filled in grids[1]:
        is_known = (flow.pack_latents(filled) == flow.pack_latents(holed)).all(dim=2)
        assert 0 < is_known.float().mean() < 1
        assert not (flow.pack_latents(filled) == flow.pack_latents(real)).all(dim=2).any()


def test_after_a_step_only_the_norms_of_the_trained_adapter_are_out_of_date(folder):
    objective, model = built(folder)
    counts = lambda: [adapted._clock.count for adapted in objective.named.of.values()]  # noqa: E731
    objective.after_step()
    assert counts() == [1, 1], "a state was loaded"
    with torch.no_grad():
        for adapter, expected in (("completion", [1, 2]), ("synthesis", [2, 2]), ("completion", [2, 3])):
            objective.loss(model, batch_of(objective, adapter))
            objective.validate(model)
            objective.after_step()
            assert counts() == expected


def test_a_magnitude_that_never_moves_is_noticed_by_the_updates_of_its_own_adapter(folder):
    objective, model = built(folder)
    objective.after_step()
    with torch.no_grad():
        for _ in range(9):
            objective.loss(model, batch_of(objective, "completion"))
            objective.after_step()
        objective.validate(model)
        assert objective.describe()["moved/magnitude/img_attn/completion"] == 0
        objective.loss(model, batch_of(objective, "completion"))
        objective.after_step()
    with pytest.raises(RunError, match=r"^not one magnitude of completion has moved in 10 updates"):
        objective.describe()


def test_a_hole_that_covers_nothing_is_refused_by_its_sample(made):
    objective, model = made
    batch = batch_of(objective, "completion")
    batch["holes"][1] = 0
    told = rf"^sample {batch['keys'][1]}: a hole of it covers nothing, .*; remove the cache .* and run `ccmdist precom"
    with pytest.raises(CacheError, match=told):
        objective.loss(model, batch)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ([], "data.holes: objective.adapters has completion, which needs images with holes in the cache; set data.hol"),
        (["objective.adapters=[repair]"], "adapters.0: should be 'synthesis' or 'completion' (got 'repair')"),
        (["objective.adapters=[]"], "objective.adapters: [] must name synthesis, completion or both, each once"),
        (["objective.adapters=[synthesis]"], "objective.layout_weight: 1 needs the layout, which is cached where data"),
        ([*HOLES, "objective.completion_fraction=1"], "completion_fraction: should be less than 1 (got 1)"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_read(overrides, problem):
    with pytest.raises(ConfigError) as error:
        load(TrainConfig, [], ["run=r", "data.shards=s", "data.model=m", "objective.kind=dual", *overrides])
    assert problem in str(error.value)
