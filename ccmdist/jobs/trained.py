"""What a run has trained, an adapter or a network of its own: found wherever it lies, and where it comes from."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from ccmdist.cluster.best_checkpoint import BEST, pointed_checkpoint
from ccmdist.cluster.run_directory import COMMITTED, RunDirectory
from ccmdist.config.loading import validate
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import UNKNOWN
from ccmdist.errors import ModelError
from ccmdist.train.checkpoint import Checkpoint, newest_valid, verified

State = TypeVar("State")


def find_trained(
    path: Path,
    what: Literal["adapter", "network"],
    exported: Callable[[Path], State | None],
    of_checkpoint: Callable[[Checkpoint, TrainConfig], State],
) -> State | None:
    """What lies in a folder: an exported one, that of a run's newest checkpoint, or that of one checkpoint.

    Args:
        path: The folder; or the file RUN/best.json, for that of the checkpoint it points at.
        what: Is looked for.
        exported: Reads an exported folder; None for a folder of another kind.
        of_checkpoint: Takes it from a checkpoint, given the settings of the run.

    Returns:
        None if there is none.

    Raises:
        CheckpointError: If the checkpoint asked for is broken, or the pointer points at none.
        ModelError: If the settings of the run are not known.
    """
    if path.name == BEST:
        path = pointed_checkpoint(path)
    if (found := exported(path)) is not None:
        return found
    if COMMITTED.fullmatch(path.name) and path.is_dir():
        return of_checkpoint(verified(path), settings_of(run_of(path)))
    run = run_of(path)
    if (checkpoint := newest_valid(run.checkpoints)) is not None:
        return of_checkpoint(checkpoint, settings_of(run))
    return exported(run.trained(what))


def quantity_of(checkpoint: Checkpoint) -> Literal["average", "weight"]:
    """What of each parameter is used after training: its moving average where the run kept one."""
    return "average" if checkpoint.manifest["has_average"] else "weight"


def facts_of(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, str]:
    """Where the weights of a checkpoint come from, given the settings of its run."""
    manifest = checkpoint.manifest
    names = ("base_digest", "data_digest", "config_digest", "step", "samples_seen")
    return {name: str(manifest[name]) for name in names} | {
        # Which subjects it has seen: an evaluation may test it on none of them.
        "training_set_digest": str(manifest.get("training_set_digest", UNKNOWN)),
        "training_split": "train",
        "weights": "moving average" if quantity_of(checkpoint) == "average" else "last",
        **({"structure": config.data.structure} if config.data.structure != "mask" else {}),
    }


def run_of(path: Path) -> RunDirectory:
    """The run that a folder is, that a checkpoint belongs to, or whose best checkpoint RUN/best.json points at.

    Raises:
        CheckpointError: If the pointer points at none.
    """
    if path.name == BEST:
        path = pointed_checkpoint(path)
    return RunDirectory(path.resolve().parent.parent if COMMITTED.fullmatch(path.name) else path)


def settings_of(run: RunDirectory) -> TrainConfig:
    """The settings that a run was begun with.

    Raises:
        ModelError: If they are not there.
    """
    try:
        values = run.settings()
    except (OSError, ValueError):
        raise ModelError(
            f"{run.config}: is missing or cannot be read, so the settings of what was trained are not known",
            "keep checkpoints in the folder of their run",
        ) from None
    return validate(TrainConfig, values, source=str(run.config))
