"""No padding reaches the model in training, whatever lengths the prompts have."""

from itertools import islice

import pytest
import torch

from ccmdist.train.objectives.edit import EditObjective
from tests.unit.train.asked_model import Asked, OneRank
from tests.unit.train.uneven_prompts import WITH_EYE, WITHOUT_EYE, make_uneven_world, train_config

NUM_TOKENS = 4 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uneven")
    make_uneven_world(folder)
    return folder


def true_lengths(objective):
    return {entry.key: entry.num_text_tokens for split in ("train", "val") for entry in objective.cache.entries(split)}


def assert_unpadded(call, lengths):
    assert call.get("encoder_hidden_states_mask") is None
    assert call.get("attention_kwargs") is None
    assert set(lengths) == {call["encoder_hidden_states"].shape[1]}, "samples of other lengths, or padding"
    assert call["hidden_states"].shape[1] == 2 * NUM_TOKENS


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_micro_batch_has_one_text_length_and_no_mask(folder, micro_batch_size):
    objective = EditObjective(train_config(folder, f"micro_batch_size={micro_batch_size}"), OneRank())
    model, lengths = Asked(), true_lengths(objective)
    seen = set()
    # Several epochs: what is left of an epoch is carried into the next.
    for batch in islice(objective.batches(0), 40 // micro_batch_size):
        objective.loss(model, batch)
        assert len(batch["keys"]) == micro_batch_size
        assert_unpadded(model.calls.pop(), [lengths[key] for key in batch["keys"]])
        seen |= set(batch["keys"])
    assert {lengths[key] for key in seen} == {WITH_EYE, WITHOUT_EYE}
    assert len(seen) == 11, "samples that would not fit a cell were left out"


def test_held_out_losses_and_monitored_images_are_unpadded_too(folder, monkeypatch):
    objective = EditObjective(train_config(folder, "monitor.denoise_steps=2", "monitor.num_images=3"), OneRank())
    monkeypatch.setattr(objective, "_decoded_grid", lambda rows: None)
    model = Asked()
    with torch.no_grad():
        objective.validate(model)
    objective.images(model)
    sizes = {call["encoder_hidden_states"].shape[1] for call in model.calls}
    assert sizes == {WITH_EYE, WITHOUT_EYE}
    for call in model.calls:
        assert_unpadded(call, [call["encoder_hidden_states"].shape[1]])
