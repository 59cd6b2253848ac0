"""What `ccmdist train --dry-run` tells: batches, epochs and where the run stands. Imports no torch."""

from collections import Counter

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.cluster.ranks import Ranks, ranks_from_environment
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.data import DataSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry, cache_folder, fingerprint, indexes, no_cache, read_fingerprint
from ccmdist.data.manifest import read_manifest
from ccmdist.data.order import Order
from ccmdist.models.model_folder import ModelFolder


def describe(config: TrainConfig) -> str:
    """What the command would do; everything that would refuse to start refuses here too.

    Raises:
        CcmdistError: If the model, the shards or the cache are not there or do not fit, or the batch does not divide.
    """
    model = ModelFolder.open(config.data.model)
    entries = training_entries(config.data, model)
    order = Order(entries, config.seed, config.micro_batch_size, config.balance, config.shuffle_window)
    ranks = ranks_from_environment() or Ranks(0, 0, config.processes)
    cells = order.cells_of_step(0, config.global_batch_size, ranks.global_rank, ranks.world_size)
    groups = Counter(entry.clinical_group or UNLABELLED for entry in entries)
    epochs = config.num_steps * config.global_batch_size / order.samples_per_epoch
    attempts = RunDirectory(config.run).attempts()
    start = (
        f"goes on after attempt {len(attempts)}, which ended at step {attempts[-1]['last_step']}" if attempts else "new"
    )
    return (
        f"model: Qwen-Image-Edit {model.version} at {config.data.model}, adapter {config.adapter.kind} "
        f"of rank {config.adapter.lora_rank}\n"
        f"samples: {len(entries)} ({', '.join(f'{name} {count}' for name, count in sorted(groups.items()))})\n"
        f"batches: {config.num_steps} steps of {config.global_batch_size} samples, {epochs:.1f} epochs; "
        f"on each of {ranks.world_size} ranks {len(cells)} micro-batches of {config.micro_batch_size} per step\n"
        f"run: {config.run}, {start}"
    )


def training_entries(data: DataSettings, model: ModelFolder) -> list[CacheEntry]:
    """The cached samples of the train split, found without opening a tar.

    Raises:
        CacheError: If no cache fits, or shards are missing in it.
    """
    manifest = read_manifest(data.shards)
    wanted = fingerprint(data, manifest.digest, model.encoder_identity())
    folder = cache_folder(data, wanted)
    if read_fingerprint(folder) != wanted:
        raise no_cache(data, wanted)
    return [entry for index in indexes(folder, manifest.of_split("train"), data) for entry in index.entries]
