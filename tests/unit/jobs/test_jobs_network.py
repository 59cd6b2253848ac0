"""The network of a run is found wherever it lies, is the one that draws, and is not taken for an adapter."""

import json

import pytest
import torch

from ccmdist.cluster.best_checkpoint import BestCheckpoint
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.loading import digest, load, resolved
from ccmdist.config.train import TrainConfig
from ccmdist.errors import AdapterError, ModelError
from ccmdist.jobs.adapter import find
from ccmdist.jobs.network import find_network
from ccmdist.jobs.train_rank import export
from ccmdist.models import spade
from ccmdist.train.checkpoint import CheckpointStore
from ccmdist.train.engine import LocalParameter
from tests.unit.train.one_rank import OneRank

SPADE = (
    "objective={kind: spade, channels: [16, 16], norm_channels: 8, noise_dim: 8, discriminator_channels: 8, "
    "discriminator_layers: 1}"
)
STEPS = (2, 4)


def slices(settings, step):
    """Slices of a run of one rank: every weight of the networks, and their averages, which are weights plus one."""
    networks = {
        "generator": spade.make_generator(settings, 32, step),
        "discriminator": spade.make_discriminators(settings, 32, step),
    }
    found = {}
    for name, network in networks.items():
        for parameter, value in network.named_parameters():
            flat = value.detach().flatten()
            found[f"{name}.{parameter}"] = LocalParameter(tuple(value.shape), 0, {"weight": flat, "average": flat + 1})
    return found


@pytest.fixture(params=[False, True])
def run(tmp_path, request):
    """A run with two checkpoints, with moving averages or without."""
    overrides = [f"run={tmp_path}/run", "data.shards=s", "data.model=m", "data.image_size_px=32", SPADE]
    config = load(TrainConfig, [], overrides)
    found = RunDirectory(config.run)
    found.path.mkdir()
    found.config.write_text(json.dumps({"digest": digest(config), "settings": resolved(config)}))
    facts = {"base_digest": "none", "data_digest": "d", "config_digest": "c", "samples_seen": 8}
    facts |= {"has_average": request.param, "training_set_digest": "t"}
    for step in STEPS:
        store = CheckpointStore(found.checkpoints, OneRank(), keep=2, attempt=0)
        assert store.save(step, slices(config.objective, step), facts) == ""
    return found, config, request.param


def test_it_is_found_in_a_run_a_checkpoint_a_pointer_and_where_it_was_exported(run):
    folder, config, has_average = run
    export(folder, config)
    checkpoints = [folder.checkpoints / f"step-{step:08d}" for step in STEPS]
    best = BestCheckpoint(STEPS[0], f"checkpoints/{checkpoints[0].name}", "cldice", 0.5, 8, 4).commit(folder.path)
    places = [folder.path, folder.network, checkpoints[1], checkpoints[0], best]
    newest, exported, last, first, pointed = (find_network(place) for place in places)
    assert newest.about == exported.about == last.about
    assert first.about == pointed.about
    assert (newest.about.facts["step"], first.about.facts["step"]) == ("4", "2")
    assert newest.about.facts["training_set_digest"] == "t"
    assert newest.about.facts["training_split"] == "train"
    generator = dict(spade.make_generator(config.objective, 32, STEPS[1]).named_parameters())
    assert newest.tensors.keys() == generator.keys(), "what judges is not what draws"
    assert all(torch.equal(newest.tensors[name], value + has_average) for name, value in generator.items())


def test_a_network_is_not_taken_for_an_adapter_nor_an_adapter_for_a_network(run, tmp_path):
    folder, *_ = run
    with pytest.raises(AdapterError, match="is of a spade network, not of an adapter; give it as network= to"):
        find(folder.path)
    edit = load(TrainConfig, [], [f"run={folder.path}", "data.shards=s", "data.model=m"])
    folder.config.write_text(json.dumps({"digest": digest(edit), "settings": resolved(edit)}))
    with pytest.raises(ModelError, match="is of an adapter, not of a network; give it as adapter= to"):
        find_network(folder.path)
    folder.config.unlink()
    with pytest.raises(ModelError, match=r"config\.json: is missing or cannot be read, so the settings of what was"):
        find_network(folder.path)
    with pytest.raises(
        ModelError, match=r"holds neither network\.json nor a checkpoint that is whole; give the folder"
    ):
        find_network(tmp_path / "nowhere")
