"""RUN/best.json: which checkpoint of a run was chosen, by what, and where it lies. Retention never removes that one."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ccmdist.cluster.run_directory import CHECKPOINTS, COMMITTED
from ccmdist.commit import commit_json
from ccmdist.errors import CheckpointError

BEST: Final = "best.json"


@dataclass(frozen=True)
class BestCheckpoint:
    """What the pointer says.

    Attributes:
        step: Optimizer steps that the checkpoint has seen.
        checkpoint: Its folder, relative to the run's: a run may be moved.
        metric: By which it was chosen.
        value: Of the metric.
        num_images: Images on which the value rests.
        num_subjects: Subjects whose masks they were drawn for.
    """

    step: int
    checkpoint: str
    metric: str
    value: float
    num_images: int
    num_subjects: int

    def commit(self, run: Path) -> Path:
        """Write the pointer, in place of an earlier one; its path."""
        commit_json(run / BEST, asdict(self))
        return run / BEST


def read_best(path: Path) -> BestCheckpoint:
    """The pointer in the file ``path``.

    Raises:
        CheckpointError: If it cannot be read, or does not point at a checkpoint of its run.
    """
    try:
        found = BestCheckpoint(**json.loads(path.read_bytes()))
        folder, name = Path(found.checkpoint).parts
        if folder != CHECKPOINTS or not COMMITTED.fullmatch(name):
            raise ValueError(f"{found.checkpoint!r} is not the name of a checkpoint")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", f"`ccmdist select run={path.parent}` writes it") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error})", f"`ccmdist select run={path.parent}` writes it anew"
        ) from None
    return found


def pointed_checkpoint(path: Path) -> Path:
    """The checkpoint's folder that the pointer in the file ``path`` names.

    Raises:
        CheckpointError: If the pointer cannot be read, or the checkpoint is gone.
    """
    checkpoint = path.parent / read_best(path).checkpoint
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{path}: points at {checkpoint}, which is not there", f"choose anew: `ccmdist select run={path.parent}`"
        )
    return checkpoint
