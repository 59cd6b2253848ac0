"""Filling the cache as one process of a machine or of a Slurm array."""

from pathlib import Path

from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.ranks import ranks_from_environment, worker_from_environment
from ccmdist.config.data import DataSettings, PrecomputeConfig
from ccmdist.config.loading import read_resolved
from ccmdist.models.model_folder import ModelFolder
from ccmdist.precompute.plan import FillPlan, fill_plan

FORCED_EXIT_S = 3600.0
"""A shard is encoded to its end before a stop signal is obeyed; after this long, the process ends itself."""


def run(config_path: str) -> None:
    """Encode this worker's shards.

    Raises:
        Preempted: If a stop signal came while there was work left.
    """
    config = read_resolved(PrecomputeConfig, Path(config_path))
    # Before anything heavy is imported or loaded: a signal that comes meanwhile is obeyed as one between two shards.
    with StopFlag(FORCED_EXIT_S) as stop:
        from ccmdist.cluster.device import take_device
        from ccmdist.precompute.fill import fill_cache

        take_device(ranks_from_environment())
        fill_cache(config, *worker_from_environment(), should_stop=lambda: bool(stop))


def describe(config: PrecomputeConfig) -> str:
    """What the command would do: shards and samples that are not committed yet, and where they would go."""
    model = ModelFolder.open(config.data.model)
    plan = fill_plan(config, model)
    return (
        f"{plan.folder}: {plan.num_committed} of {len(plan.shards)} shards are committed, "
        f"{sum(shard.num_samples for shard in plan.open_shards)} samples are to be encoded by "
        f"{model.title}{_told(config.data)}"
    )


def _told(data: DataSettings) -> str:
    """What the samples are encoded with besides their nerve masks and whole images."""
    structure = "" if data.structure == "mask" else f", nerves as {data.structure.replace('_', ' ')}"
    if data.holes is None:
        return structure
    return f"{structure}, each with {data.holes.per_sample} holes ({', '.join(data.holes.shapes)})"


def open_units(config: PrecomputeConfig) -> int:
    """Shards that are not committed yet: no more array tasks than that have something to do.

    Raises:
        CcmdistError: If shards or model are not there.
    """
    return len(_plan(config).open_shards)


def _plan(config: PrecomputeConfig) -> FillPlan:
    return fill_plan(config, ModelFolder.open(config.data.model))
