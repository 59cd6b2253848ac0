"""Where a run goes on: the newest checkpoint that is whole, if it belongs to this base, this data and these shapes."""

from ccmdist.console import log
from ccmdist.errors import CheckpointError
from ccmdist.train.checkpoint import Checkpoint, CheckpointStore
from ccmdist.train.engine import Engine
from ccmdist.train.objectives.objective import Objective


def resume(engine: Engine, objective: Objective, store: CheckpointStore) -> int:
    """Take over the newest valid checkpoint; the step to go on from, 0 if there is none. Collective.

    Raises:
        CheckpointError: If it belongs to other weights, data or shapes, or the folder cannot be read.
    """
    checkpoint = store.newest()
    if checkpoint is not None:
        _check_lineage(checkpoint, objective)
        _check_shapes(checkpoint, engine)
        _check_growth(checkpoint, objective)
        engine.load(checkpoint.read, checkpoint.manifest["adam_steps"])
        if objective.growth:
            objective.growth.load_state(checkpoint.objective_state["growth"])
        log.info("resumed from %s", checkpoint.path)
    objective.after_step()
    return checkpoint.step if checkpoint else 0


def _check_lineage(checkpoint: Checkpoint, objective: Objective) -> None:
    for what, expected in (("base_digest", objective.base_digest), ("data_digest", objective.data_digest)):
        if (found := checkpoint.manifest[what]) != expected:
            noun = "base weights" if what == "base_digest" else "training data"
            raise CheckpointError(
                f"{checkpoint.path}: was trained on {noun} {found[:12]}, this run has {expected[:12]}",
                f"restore the {noun}, or choose another run folder",
            )


def _check_shapes(checkpoint: Checkpoint, engine: Engine) -> None:
    saved, now = checkpoint.manifest["parameters"], {name: list(p.shape) for name, p in engine.local.items()}
    if differing := sorted(name for name in saved.keys() | now.keys() if saved.get(name) != now.get(name)):
        first = differing[0]
        raise CheckpointError(
            f"{checkpoint.path}: {first} has shape {saved.get(first)}, this run has {now.get(first)}, "
            f"and {len(differing) - 1} others differ too",
            "restore the adapter's settings, or choose another run folder",
        )


def _check_growth(checkpoint: Checkpoint, objective: Objective) -> None:
    did_grow, grows = "growth" in checkpoint.objective_state, objective.growth is not None
    if did_grow != grows:
        told = {True: "ranks that grow", False: "ranks that do not grow"}
        raise CheckpointError(
            f"{checkpoint.path}: was trained with {told[did_grow]}, this run has {told[grows]}",
            "restore adapter.growth, or choose another run folder",
        )
