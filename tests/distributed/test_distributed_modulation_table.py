"""Training with a table of modulation is training without it, bit for bit; where it would be wrong it is left out."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ccmdist.config.loading import load
from ccmdist.config.train import TrainConfig
from ccmdist.models import mmdit
from ccmdist.models.backbones.choice import backbone_of
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.objectives.edit import EditObjective
from tests.distributed.small_world import SETTINGS, data_overrides, losses, weights

pytestmark = pytest.mark.distributed

TIMES_TWO = ("micro_batch_size=2", "num_steps=3", "monitor.images_every_steps=3", "monitor.num_images=1")


def count_parameters(rank):
    """Write down how many parameters each rank's model has, in the order in which ranks start."""
    original = mmdit.build

    def build(*arguments, **named):
        model = original(*arguments, **named)
        with parameters_file().open("a") as file:
            file.write(f"{len(list(model.parameters()))}\n")
        return model

    mmdit.build = build


def parameters_file():
    return Path(os.environ["CCMDIST_NODE_TMP"]) / "parameters"


def counted():
    found = [int(line) for line in parameters_file().read_text().splitlines()]
    parameters_file().unlink()
    return found


def test_a_tabled_run_of_two_ranks_ends_with_bitwise_the_same_adapter(train_ranks):
    folder = train_ranks.folder
    parameters_file().parent.mkdir(exist_ok=True)
    assert train_ranks("plain", 2, *TIMES_TWO, "tabulate_modulation=false", patch=count_parameters) == [0, 0]
    plain = counted()
    assert train_ranks("tabled", 2, *TIMES_TWO, "data.stage_model=true", patch=count_parameters) == [0, 0]
    assert list(parameters_file().parent.glob("ccmdist-*/model-*/transformer")), "read from the node's own disk"
    assert counted() == [plain[0] - 4 * 4 - 4] * 2, "weights and biases of two layers in each block, and of the time"
    expected, found = weights(folder / "plain"), weights(folder / "tabled")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(folder / "tabled") == losses(folder / "plain")


def test_where_the_adapter_changes_modulation_it_is_not_tabulated(world, tmp_path, caplog):
    overrides = [f"run={tmp_path}", *data_overrides(world), *SETTINGS, "adapter.targets=[attn,img_mod.1]"]
    config = load(TrainConfig, [], overrides)
    with caplog.at_level("INFO", logger="ccmdist"):
        adapted = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.img_mod.1"]
        objective = SimpleNamespace(config=config, backbone=backbone_of(ModelFolder.open(config.data.model)))
        assert EditObjective._table(objective, adapted) is None
    told = "modulation is not tabulated, for the adapter changes it: transformer_blocks.0.img_mod.1"
    assert told in caplog.text
