"""Find the network of a run that trained one from scratch, wherever it lies, and export it."""

from pathlib import Path

from ccmdist.config.objectives import DualSettings, EditSettings, SpadeSettings
from ccmdist.config.train import TrainConfig
from ccmdist.errors import ModelError
from ccmdist.jobs.trained import facts_of, find_trained, quantity_of
from ccmdist.models.network_folder import ABOUT_FILE, REMEDY
from ccmdist.models.network_state import NetworkState, read_network
from ccmdist.train.checkpoint import Checkpoint
from ccmdist.train.objectives.spade import GENERATOR_SET


def find_network(path: Path) -> NetworkState:
    """The network in a folder: an exported one, that of a run's newest checkpoint, or that of one checkpoint.

    Args:
        path: The folder; or the file RUN/best.json, for that of the checkpoint it points at.

    Raises:
        ModelError: If there is none, or it cannot be read.
        CheckpointError: If the checkpoint asked for is broken, or the pointer points at none.
    """
    if (found := find_trained(path, "network", _exported, network_of)) is not None:
        return found
    raise ModelError(f"{path}: holds neither {ABOUT_FILE} nor a checkpoint that is whole", REMEDY)


def _exported(folder: Path) -> NetworkState | None:
    return read_network(folder) if (folder / ABOUT_FILE).is_file() else None


def network_of(checkpoint: Checkpoint, config: TrainConfig) -> NetworkState:
    """The network that draws, of a training checkpoint; its moving average where the run kept one.

    Raises:
        ModelError: If the run trained an adapter.
    """
    if isinstance(settings := config.objective, EditSettings | DualSettings):
        raise ModelError(
            f"{checkpoint.path}: is of an adapter, not of a network", "give it as adapter= to `ccmdist synthesize`"
        )
    prefix = f"{GENERATOR_SET}." if isinstance(settings, SpadeSettings) else ""
    tensors = {
        name.removeprefix(prefix): checkpoint.whole(name, quantity_of(checkpoint))
        for name in checkpoint.manifest["parameters"]
        if name.startswith(prefix)
    }
    return NetworkState.of(settings, config.data.image_size_px, tensors, facts_of(checkpoint, config))
