"""MDF-MLLM is one of the networks that diagnose: only what is trained of it is counted, kept, and loaded again."""

import numpy as np
import pytest
import torch

from ccmdist.config.evaluate import NetworkSettings
from ccmdist.config.loading import digest
from ccmdist.evaluation.downstream.examples import Examples
from ccmdist.evaluation.downstream.networks import as_input, built, parameter_count, trained_state
from ccmdist.evaluation.downstream.training import train_and_test
from tests.small_mdf import make_mllms, small

SIZE_PX = 64


@pytest.fixture(scope="module")
def mllms(tmp_path_factory):
    make_mllms(folder := tmp_path_factory.mktemp("mllms"))
    return folder


def settings(mllm, **changed):
    steps = {"num_steps": 3, "batch_size": 3, "lrs": (1e-2,), "validate_every_steps": 1}
    return NetworkSettings(diagnosis="mdf_mllm", size_px=SIZE_PX, mdf=small(mllm, **changed), **steps)


def examples(num, seed):
    images = np.random.default_rng(seed).integers(0, 256, (num, SIZE_PX, SIZE_PX)).astype(np.uint8)
    return Examples(images, images > 250, (np.arange(num) % 3).astype(np.int64))


@pytest.mark.parametrize("changed", [{}, {"fusion_levels": (), "llm": "lora"}])
def test_it_is_trained_chosen_and_tested_as_the_others_are_and_a_function_of_its_seed(mllms, changed):
    chosen, sets = settings(mllms / "qwen2_5_vl", **changed), [examples(6, seed) for seed in range(3)]
    found = train_and_test("diagnosis", chosen, *sets, seed=1, device=torch.device("cpu"))
    assert found.probabilities.shape == (6, 3)
    np.testing.assert_allclose(found.probabilities.sum(1), 1, atol=1e-5)
    again = train_and_test("diagnosis", chosen, *sets, seed=1, device=torch.device("cpu"))
    assert np.array_equal(found.probabilities, again.probabilities)
    other = train_and_test("diagnosis", chosen, *sets, seed=2, device=torch.device("cpu"))
    assert not np.array_equal(found.probabilities, other.probabilities)


def test_frozen_weights_are_neither_counted_nor_kept_and_what_is_kept_gives_the_same_logits(mllms):
    network = built("diagnosis", chosen := settings(mllms / "mllama"))
    state, images = trained_state(network), as_input(torch.from_numpy(examples(2, 0).images))
    assert parameter_count(network) == sum(value.numel() for value in state.values())
    assert not [name for name in state if name.endswith("q_proj.weight")]
    with torch.no_grad():
        for name, value in network.named_parameters():
            if name in state:
                value.add_(0.05)
        expected = network(images)
        again = built("diagnosis", chosen)
        again(images)  # norms of the adapter as they are now must not stay
        again.load_state_dict(trained_state(network), strict=False)
        assert torch.equal(again(images), expected)


def test_settings_without_it_are_written_as_before_and_those_that_do_not_fit_are_refused(mllms):
    assert "mdf" not in NetworkSettings().model_dump(mode="json")
    chosen = settings(mllms / "mllama")
    assert NetworkSettings.model_validate(chosen.model_dump(mode="json")) == chosen
    assert digest(chosen) != digest(settings(mllms / "mllama", film=False))
    with pytest.raises(ValueError, match=r"mdf: settings of mdf_mllm, and of nothing else \(diagnosis: mdf_mllm"):
        NetworkSettings(diagnosis="mdf_mllm")
    with pytest.raises(ValueError, match=r"\(diagnosis: small\)"):
        NetworkSettings(mdf=small(mllms / "mllama"))
    with pytest.raises(ValueError, match="token_grid: 4 does not divide the 6 px of level 4"):
        NetworkSettings(diagnosis="mdf_mllm", size_px=96, mdf=small(mllms / "mllama"))
    with pytest.raises(ValueError, match="size_px: 72 is no multiple of 16, as mdf_mllm needs it"):
        NetworkSettings(diagnosis="mdf_mllm", size_px=72, mdf=small(mllms / "mllama"))
