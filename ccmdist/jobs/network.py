"""Find the network of a run that trained one from scratch, wherever it lies, and export it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from ccmdist.cluster.device import current_device
from ccmdist.config.objectives.adapters import DualSettings, EditSettings
from ccmdist.config.objectives.msdm import MsdmVaeSettings
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.config.train import TrainConfig
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.errors import ModelError
from ccmdist.jobs.trained import facts_of, find_trained, quantity_of
from ccmdist.models.msdm import SCALING_FACTOR, make_vae, measured_scaling
from ccmdist.models.network_folder import ABOUT_FILE, REMEDY
from ccmdist.models.network_kinds import NETWORKS
from ccmdist.models.network_state import NetworkState, read_network
from ccmdist.train.checkpoint import Checkpoint
from ccmdist.train.objectives.ordered_samples import spread_over


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
    if (special := OF_CHECKPOINT.get(settings.kind)) is not None:
        return special(checkpoint, config)
    parts = config.data.model if settings.sees == "latents" else None
    facts = facts_of(checkpoint, config)
    return NetworkState.of(settings, config.data.image_size_px, tensors_of(checkpoint, settings.kind), facts, parts)


def tensors_of(checkpoint: Checkpoint, kind: NetworkKind) -> dict[str, Tensor]:
    """The weights of the network that is kept, of a training checkpoint; their moving average where there is one."""
    prefix = NETWORKS[kind].prefix
    return {
        name.removeprefix(prefix): checkpoint.whole(name, quantity_of(checkpoint))
        for name in checkpoint.manifest["parameters"]
        if name.startswith(prefix)
    }


def _vae_of(checkpoint: Checkpoint, config: TrainConfig) -> NetworkState:
    """The VAE of MSDM, and how its latents are scaled, which is measured on images of the train split."""
    settings = config.objective
    assert isinstance(settings, MsdmVaeSettings), settings.kind
    tensors = tensors_of(checkpoint, settings.kind)
    vae = make_vae(settings, 0)
    vae.load_state_dict(tensors)
    samples = ShardSamples(config.data, ("train",))
    entries = spread_over(samples.entries("train"), NUM_MEASURED)
    factor = measured_scaling(vae.eval().to(current_device()), (samples.triple(entry).image for entry in entries))
    facts = facts_of(checkpoint, config) | {SCALING_FACTOR: repr(factor)}
    return NetworkState.of(settings, config.data.image_size_px, tensors, facts)


NUM_MEASURED: Final = 300
"""Images, at most, on which the scale of latents is measured."""
OF_CHECKPOINT: Final[Mapping[NetworkKind, Callable[[Checkpoint, TrainConfig], NetworkState]]] = {"msdm_vae": _vae_of}
"""Kinds that need more than their weights and settings."""
