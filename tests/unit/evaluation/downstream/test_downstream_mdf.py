"""MDF-MLLM is one of the networks that diagnose: only what is trained of it is counted, kept, and loaded again."""

import base64
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from small_sets import config_of, draw, phantoms

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.arms import Arm
from ccmdist.config.evaluate import NetworkSettings
from ccmdist.config.loading import digest
from ccmdist.evaluation.downstream import training
from ccmdist.evaluation.downstream.cells import Cell
from ccmdist.evaluation.downstream.examples import Examples
from ccmdist.evaluation.downstream.folds import Fold, Source
from ccmdist.evaluation.downstream.grid import planned
from ccmdist.evaluation.downstream.looks import looks_of
from ccmdist.evaluation.downstream.networks import as_input, built, parameter_count, trained_state
from ccmdist.evaluation.downstream.summary import _shown_looks
from ccmdist.evaluation.downstream.training import train_and_test
from ccmdist.evaluation.sets import open_sets
from ccmdist.models.make_mllm import make_mllm
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


def test_the_language_model_is_read_once_however_many_learning_rates_are_tried(mllms, monkeypatch):
    """Two of 11 B at once would fill a GPU."""
    chosen, sets = settings(mllms / "mllama"), [examples(6, seed) for seed in range(3)]
    alone = [
        train_and_test("diagnosis", chosen.model_copy(update={"lrs": (lr,)}), *sets, seed=1, device=torch.device("cpu"))
        for lr in (1e-2, 1e-3)
    ]
    made = []
    monkeypatch.setattr(training, "built", lambda *given: made.append(built(*given)) or made[-1])
    both = chosen.model_copy(update={"lrs": (1e-2, 1e-3)})
    found = train_and_test("diagnosis", both, *sets, seed=1, device=torch.device("cpu"))
    assert len(made) == 1
    assert found.curves == tuple(one.curves[0] for one in alone)
    best = next(one for one in alone if one.lr == found.lr)
    assert np.array_equal(found.probabilities, best.probabilities)
    assert found.num_parameters == parameter_count(made[0])


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


def test_a_cell_is_the_same_wherever_the_language_model_lies_and_another_with_other_weights(mllms, tmp_path):
    real = Source("real", tmp_path, phantoms(tmp_path / "real", 2))

    def digest(mllm, task="diagnosis"):
        cell = Cell(tmp_path, task, Fold(0, real, {}, {}), Arm("real"), 0, 0, settings(mllm))
        return cell.digest

    expected = digest(mllms / "mllama")
    assert digest(shutil.copytree(mllms / "mllama", tmp_path / "moved")) == expected
    make_mllm("mllama", tmp_path / "other", seed=1)
    assert digest(tmp_path / "other") != expected
    assert digest(tmp_path / "other", "segmentation") == digest(mllms / "mllama", "segmentation")


def decoded(png):
    return np.array(Image.open(io.BytesIO(base64.b64decode(png))))


def test_where_it_looked_is_shown_for_one_image_of_each_group(mllms):
    network, test = built("diagnosis", settings(mllms / "qwen2_5_vl", fusion_levels=(2, 4))), examples(7, 0)
    looks = looks_of(network, test, torch.device("cpu"))
    assert [look.index for look in looks] == [0, 1, 2]
    for look in looks:
        assert list(look.pictures) == ["frame", "saliency", "level 2", "level 4"]
        pictures = [decoded(png) for png in look.pictures.values()]
        assert np.array_equal(pictures[0], test.images[look.index])
        assert all(picture.shape == (SIZE_PX, SIZE_PX) and picture.dtype == np.uint8 for picture in pictures)
        assert not np.array_equal(pictures[1], pictures[2])
    assert all(parameter.grad is None for parameter in network.parameters())


def test_saliency_lies_where_the_output_depends_on_the_image():
    class Corner(torch.nn.Module):
        def forward(self, x):
            assert len(x) == 1, "gradients through a large model, for several images at once"
            return torch.stack([x[:, 0, :16, :16].sum((1, 2)), *x.new_zeros(2, len(x)) - 1e6], dim=1)

    (look, *_) = looks_of(Corner(), examples(3, 0), torch.device("cpu"))
    lit = decoded(look.pictures["saliency"]).astype(float) - 0.75 * examples(3, 0).images[0]
    assert lit[:12, :12].mean() > 50
    assert abs(lit[20:, 20:]).max() < 1


def test_a_cell_keeps_where_its_network_looked_and_files_of_before_can_be_read(mllms, tmp_path):
    phantoms(tmp_path / "real", 4)
    draw(tmp_path / "real", tmp_path / "x")
    chosen = json.dumps(settings(mllms / "mllama").model_dump(mode="json"))
    words = [f"downstream.networks={chosen}", "downstream.arms=[real]", "downstream.tasks=[diagnosis]"]
    given = config_of(tmp_path / "real", {"x": tmp_path / "x"}, tmp_path / "out", *words)
    cell = planned(open_sets(given), given.downstream).tasks[0].cells[0]
    shown = _shown_looks(cell.result())
    assert {look.clinical_group for look in shown} == set(CLINICAL_GROUPS)
    assert [*shown[0].pictures] == ["frame", "saliency", *(f"level {level}" for level in (1, 2, 3, 4))]
    values = json.loads(cell.path.read_text())
    del values["looks"]
    cell.path.write_text(json.dumps(values))
    assert cell.is_done()
    assert _shown_looks(cell.result()) == []
