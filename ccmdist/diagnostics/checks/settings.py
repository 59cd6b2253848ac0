"""What the given settings need: model files that are complete, shards, the cache, a batch that divides. No network."""

from collections.abc import Callable

from ccmdist.cluster.ranks import ranks_from_environment
from ccmdist.config.data import DataSettings
from ccmdist.data.cache_index import find_cache, indexes
from ccmdist.data.manifest import read_manifest
from ccmdist.diagnostics.checks.finding import DoctorConfig, Finding, Findings, Request, size
from ccmdist.diagnostics.checks.lead import timeouts
from ccmdist.errors import CcmdistError, ShardError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.capabilities import refuse_missing_files, refuse_unable


def check(request: Request) -> Findings:
    """Everything at which `ccmdist train` would refuse to start, without opening a tar or loading a weight."""
    if (config := request.config) is None:
        return
    sources = [_told("shard set", lambda: _shards(config.data))]
    if needs_cache := config.objective.sees == "latents":
        sources = [_told("model files", lambda: _model(config)), *sources]
    if config.objective.files:
        yield _told("objective's files", lambda: _files(config))
    yield from sources
    if needs_cache and all(finding.state == "OK" for finding in sources):  # both are part of the cache's name
        yield _told("cached samples", lambda: _cache(config.data))
    yield _batch(config)
    yield from timeouts(config)


def _told(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "OK", look())
    except CcmdistError as error:
        return Finding(what, "MISS", error.message, error.remedy)


def _model(config: DoctorConfig) -> str:
    """Every file that the model's indexes name is there and has all its bytes, and the model can be so trained."""
    model = ModelFolder.open(config.data.model, *config.objective.model_kinds)
    if config.objective.trains == "adapter":
        refuse_unable(config, model)
    sizes = {c: sum(f.stat().st_size for f in set(model.weight_files(c).values())) for c in model.components}
    parts = ", ".join(f"{component} {size(num_bytes)}" for component, num_bytes in sizes.items())
    return f"{model.title}, complete: {parts}"


def _files(config: DoctorConfig) -> str:
    """All that the objective's settings name is there."""
    refuse_missing_files(config)
    return ", ".join(f"{name} {path}" for name, path in config.objective.files.items())


def _shards(data: DataSettings) -> str:
    manifest = read_manifest(data.shards)
    for shard in manifest.shards:
        tar = data.shards / shard.name
        num_bytes = tar.stat().st_size if tar.is_file() else 0
        if num_bytes != shard.num_bytes:
            remedy = f"copy it again, then `ccmdist shards verify {data.shards}`"
            raise ShardError(f"{tar}: has {num_bytes} bytes, expected {shard.num_bytes}", remedy)
    counts = {split: sum(shard.num_samples for shard in manifest.of_split(split)) for split in ("train", "val", "test")}
    return f"{manifest.kind}, {', '.join(f'{split} {count}' for split, count in counts.items())} samples"


def _cache(data: DataSettings) -> str:
    manifest = read_manifest(data.shards)
    folder, _ = find_cache(data, manifest.digest, ModelFolder.open(data.model).encoder_identity())
    found = indexes(folder, manifest.of_split("train"), data)
    return f"{folder}: {sum(len(index.entries) for index in found)} of train"


def _batch(config: DoctorConfig) -> Finding:
    ranks = ranks_from_environment()
    world_size = ranks.world_size if ranks is not None else _wanted_ranks(config)
    per_round = world_size * config.micro_batch_size
    on_ranks = f"{world_size} rank{'s' * (world_size > 1)}"
    found = f"{config.global_batch_size} samples per step on {on_ranks}, {config.micro_batch_size} at a time"
    if config.global_batch_size % per_round:
        remedy = f"set global_batch_size={-(-config.global_batch_size // per_round) * per_round}, or other ranks"
        return Finding("batch", "MISS", found, f"{remedy}: every rank does the same number of micro-batches")
    return Finding("batch", "OK", found)


def _wanted_ranks(config: DoctorConfig) -> int:
    if "slurm" in config.model_fields_set:
        return config.slurm.nodes * config.slurm.num_tasks_per_node
    return config.processes
