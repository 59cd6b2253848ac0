"""Find the network of a run that trained one from scratch, wherever it lies, and export it."""

import json
from pathlib import Path

from ccmdist.cluster.best_checkpoint import BEST, pointed_checkpoint
from ccmdist.cluster.run_directory import COMMITTED, RunDirectory
from ccmdist.config.loading import validate
from ccmdist.config.objectives import EditSettings, SpadeSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import UNKNOWN
from ccmdist.errors import ModelError
from ccmdist.models.network_folder import ABOUT_FILE, REMEDY
from ccmdist.models.network_state import NetworkState, read_network
from ccmdist.train.checkpoint import Checkpoint, newest_valid, verified
from ccmdist.train.objectives.spade import GENERATOR_SET


def find_network(path: Path) -> NetworkState:
    """The network in a folder: an exported one, that of a run's newest checkpoint, or that of one checkpoint.

    Args:
        path: The folder; or the file RUN/best.json, for that of the checkpoint it points at.

    Raises:
        ModelError: If there is none, or it cannot be read.
        CheckpointError: If the checkpoint asked for is broken, or the pointer points at none.
    """
    if path.name == BEST:
        path = pointed_checkpoint(path)
    if (path / ABOUT_FILE).is_file():
        return read_network(path)
    if COMMITTED.fullmatch(path.name) and path.is_dir():
        return network_of(verified(path), _config_of(RunDirectory(path.resolve().parent.parent)))
    run = RunDirectory(path)
    if (checkpoint := newest_valid(run.checkpoints)) is not None:
        return network_of(checkpoint, _config_of(run))
    if (run.network / ABOUT_FILE).is_file():
        return read_network(run.network)
    raise ModelError(f"{path}: holds neither {ABOUT_FILE} nor a checkpoint that is whole", REMEDY)


def network_of(checkpoint: Checkpoint, config: TrainConfig) -> NetworkState:
    """The network that draws, of a training checkpoint; its moving average where the run kept one.

    Raises:
        ModelError: If the run trained an adapter.
    """
    settings, manifest = config.objective, checkpoint.manifest
    if isinstance(settings, EditSettings):
        raise ModelError(
            f"{checkpoint.path}: is of an adapter, not of a network", "give it as adapter= to `ccmdist synthesize`"
        )
    quantity = "average" if manifest["has_average"] else "weight"
    prefix = f"{GENERATOR_SET}." if isinstance(settings, SpadeSettings) else ""
    tensors = {
        name.removeprefix(prefix): checkpoint.whole(name, quantity)
        for name in manifest["parameters"]
        if name.startswith(prefix)
    }
    facts = {name: str(manifest[name]) for name in ("base_digest", "data_digest", "config_digest", "step")}
    facts |= {
        "training_set_digest": str(manifest.get("training_set_digest", UNKNOWN)),
        "training_split": "train",
        "samples_seen": str(manifest["samples_seen"]),
        "weights": "moving average" if quantity == "average" else "last",
    }
    return NetworkState.of(settings, config.data.image_size_px, tensors, facts)


def _config_of(run: RunDirectory) -> TrainConfig:
    try:
        values = json.loads(run.config.read_text())["settings"]
    except (OSError, ValueError, KeyError):
        raise ModelError(
            f"{run.config}: is missing or cannot be read, so the settings of the network are not known",
            "keep checkpoints in the folder of their run",
        ) from None
    return validate(TrainConfig, values, source=str(run.config))
