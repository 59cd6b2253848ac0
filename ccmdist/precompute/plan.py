"""Which shards a worker has to encode, and where to; imports no torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.config.data import PrecomputeConfig
from ccmdist.data.cache_index import cache_folder, fingerprint, is_committed
from ccmdist.data.manifest import ShardEntry, read_manifest
from ccmdist.errors import ShardError
from ccmdist.models.model_folder import ModelFolder


@dataclass(frozen=True)
class FillPlan:
    """What one worker has to do."""

    folder: Path
    """Of the cache."""
    fingerprint: dict[str, Any]
    all_shards: tuple[ShardEntry, ...]
    """The source shards of all workers."""
    shards: tuple[ShardEntry, ...]
    """Those of this worker, done or not."""
    open_shards: tuple[ShardEntry, ...]
    """Those of this worker that were not committed when the plan was made."""

    @property
    def num_committed(self) -> int:
        """Shards of all workers that are committed by now."""
        return len(self.all_shards) - len(_open(self.folder, self.all_shards))


def fill_plan(config: PrecomputeConfig, model: ModelFolder, worker_index: int = 0, num_workers: int = 1) -> FillPlan:
    """The plan of worker ``worker_index``, who takes the shards ``worker_index::num_workers``; writes nothing.

    Raises:
        ShardError: If frames that are to get the next group's prompt have no group.
    """
    manifest = read_manifest(config.data.shards)
    wanted = fingerprint(config.data, manifest.digest, model.encoder_identity())
    folder = cache_folder(config.data, wanted)
    shards = tuple(shard for split in config.splits for shard in manifest.of_split(split))
    if config.data.prompts != "given":
        _refuse_unlabelled(config, shards)
    mine = shards[worker_index::num_workers]
    return FillPlan(folder, wanted, shards, mine, _open(folder, mine))


def _refuse_unlabelled(config: PrecomputeConfig, shards: tuple[ShardEntry, ...]) -> None:
    if num := sum(shard.group_counts.get(UNLABELLED, 0) for shard in shards):
        total = sum(shard.num_samples for shard in shards)
        raise ShardError(
            f"{config.data.shards}: {num} of {total} samples of {', '.join(config.splits)} are unlabelled, and "
            f"data.prompts {config.data.prompts} needs a clinical group to have a next one",
            "leave unlabelled frames out of the set, name only splits without them, or set data.prompts=given",
        )


def _open(folder: Path, shards: tuple[ShardEntry, ...]) -> tuple[ShardEntry, ...]:
    return tuple(shard for shard in shards if not is_committed(folder, shard.name))
