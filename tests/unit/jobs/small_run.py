"""A training run whose checkpoints nobody trained: adapters of the fitted tiny model, harmless and damaged ones."""

import json

import torch

from ccmdist.config.data import PhantomShardsConfig, PrecomputeConfig
from ccmdist.config.loading import digest, load, resolved
from ccmdist.config.train import LoRASettings, TrainConfig
from ccmdist.data.phantom_shards import write_phantom_set
from ccmdist.jobs.adapter_check import linear_shapes
from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_state import make_network
from ccmdist.precompute.fill import fill_cache
from ccmdist.train.checkpoint import CheckpointStore
from ccmdist.train.engine import LocalParameter
from ccmdist.train.objectives.spade import GENERATOR_SET
from tests.unit.train.one_rank import OneRank

SIZE_PX = 96


def data_overrides(sources, size_px=SIZE_PX):
    """The section `data` of the sources."""
    named = [f"data.{name}={sources}/{name}" for name in ("shards", "model", "cache")]
    return [*named, f"data.image_size_px={size_px}", "data.dtype=fp32"]


def make_sources(folder):
    """Phantoms, the fitted tiny model and the cache of the val split: shards/, model/ and cache/ in ``folder``."""
    frames = {"subjects_per_group": 2, "frames_per_subject": 2, "val_fraction": 0.5, "test_fraction": 0}
    write_phantom_set(PhantomShardsConfig(out=folder / "shards", size_px=SIZE_PX, samples_per_shard=4, **frames))
    make_model("tiny", "2509", folder / "model", fitted=True)
    fill_cache(load(PrecomputeConfig, [], [*data_overrides(folder), "splits=[val]"]), 0, 1)


def make_run(folder, sources, damage_of_step, keep=9, size_px=SIZE_PX, more=(), names=("",), objective_state=None):
    """A run folder with a checkpoint for each step, whose adapter moves the weights by this much of their own size.

    Several adapters have ``names``, and what else makes a run of another kind is said by ``more`` settings.
    """
    settings = LoRASettings(lora_rank=2)
    overrides = [f"run={folder}", *data_overrides(sources, size_px), "adapter.kind=lora", "adapter.lora_rank=2", *more]
    config = load(TrainConfig, [], [*overrides, f"checkpoint.keep={keep}"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"digest": digest(config), "settings": resolved(config)}))
    for step, damage in damage_of_step.items():
        add_checkpoint(folder, sources, settings, step, damage, keep, names, objective_state)
    return folder


def add_checkpoint(folder, sources, settings, step, damage, keep=9, names=("",), objective_state=None):
    """Commit a checkpoint as a run of one rank does."""
    model = ModelFolder.open(sources / "model")
    source = torch.Generator().manual_seed(step)
    parameters = {}
    for name, (num_out, num_in) in linear_shapes(model).items():
        if ".attn." in name:
            A = torch.randn(settings.lora_rank, num_in, generator=source) / num_in**0.5
            B = damage * torch.randn(num_out, settings.lora_rank, generator=source)
            for kind, tensor in (("lora_A", A), ("lora_B", B)):
                for adapter in names:
                    values = {"weight": tensor.flatten().clone()}
                    owner = f"{name}.{adapter}" if adapter else name
                    parameters[f"{owner}.{kind}"] = LocalParameter(tuple(tensor.shape), 0, values)
    facts = {"samples_seen": step, "config_digest": "c", "data_digest": "d", "has_average": False}
    facts["objective_state"] = objective_state or {}
    store = CheckpointStore(folder / "checkpoints", OneRank(), keep, attempt=0)
    assert store.save(step, parameters, facts | {"base_digest": model.transformer_digest()}) == ""


def make_network_run(folder, sources, steps, objective=None):
    """A run that trains a SPADE network or another one, with a checkpoint of random weights for each step."""
    spade = {"kind": "spade", "channels": [16, 16], "norm_channels": 8, "noise_dim": 8}
    spade |= {"discriminator_channels": 8, "discriminator_layers": 1}
    wanted = f"objective={json.dumps(objective or spade)}"
    config = load(TrainConfig, [], [f"run={folder}", *data_overrides(sources), wanted])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"digest": digest(config), "settings": resolved(config)}))
    for step in steps:
        parameters = {
            f"{GENERATOR_SET}.{name}": LocalParameter(tuple(tensor.shape), 0, {"weight": tensor.flatten().clone()})
            for name, tensor in make_network(config.objective, SIZE_PX, step).state_dict().items()
        }
        facts = {"samples_seen": step, "config_digest": "c", "data_digest": "d", "base_digest": "b"}
        store = CheckpointStore(folder / "checkpoints", OneRank(), 9, attempt=0)
        assert store.save(step, parameters, facts | {"has_average": False}) == ""
    return folder
