"""Start a training run, or tell what it would do. Imports no torch: that is left to the processes that train."""

import importlib
import importlib.util
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

from ccmdist.ccm.groups import UNLABELLED
from ccmdist.cluster.local_launch import launch
from ccmdist.cluster.preemption import hold_back_stop_signals
from ccmdist.cluster.ranks import Ranks, ranks_from_environment, rendezvous_from_environment
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.cluster.sections import job_began
from ccmdist.commit import commit_json
from ccmdist.config.data import DataSettings
from ccmdist.config.loading import resolved
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.config.train import TrainConfig, system_of
from ccmdist.data.cache_index import find_cache, indexes
from ccmdist.data.cached_samples import CachedSamples
from ccmdist.data.manifest import read_manifest
from ccmdist.data.order import Order
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.errors import ConfigError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.planner.memory import memory, tokens_of
from ccmdist.planner.mode import mode_as_set, needed
from ccmdist.planner.plan import check_growth
from ccmdist.planner.table import needs_line
from ccmdist.planner.transformer import Transformer
from ccmdist.train.capabilities import refuse_missing_files, refuse_missing_groups, refuse_unable

RANK_MODULE: Final = "ccmdist.jobs.train_rank"


def start(config: TrainConfig, allowed_changes: frozenset[str] = frozenset()) -> int:
    """Train as the rank that a cluster made of this process, or in as many local processes as asked for.

    Returns:
        The exit code. Under a cluster a clean stop is 0: whoever started the ranks reads outcome.json.
    """
    hold_back_stop_signals()
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as folder:
        job = Path(folder) / "job.json"
        values = {"settings": resolved(config), "allowed_changes": sorted(allowed_changes)}
        commit_json(job, values | {"began": job_began(os.environ)})
        if (ranks := ranks_from_environment()) is not None:
            return _run_here(job, ranks, rendezvous_from_environment())
        if config.processes > 1:
            code = launch(RANK_MODULE, "run_rank", str(job), config.processes)
        else:
            code = _run_here(job, Ranks(0, 0, 1), f"file://{folder}/rendezvous")
    return code or RunDirectory(config.run).exit_code()


def _run_here(job: Path, ranks: Ranks, rendezvous: str) -> int:
    code: int = importlib.import_module(RANK_MODULE).run_rank(str(job), ranks, rendezvous)
    return code


def describe(config: TrainConfig) -> str:
    """What the command would do; everything that would refuse to start refuses here too.

    Raises:
        CcmdistError: If a library, the model, the shards or the cache are not there or do not fit, the batch does not
            divide, or a budget of ranks does not suffice.
    """
    refuse_missing_libraries(config)
    refuse_missing_files(config)
    objective = config.objective
    model = None if objective.sees == "pixels" else ModelFolder.open(config.data.model, *objective.model_kinds)
    if model is not None and objective.trains == "adapter":
        refuse_unable(config, model)
        if model.layout.is_planned:
            check_growth(config, Transformer.from_config(model.config("transformer")))
    entries = _entries(config, model)
    if isinstance(objective, DiagnoseSettings):
        refuse_missing_groups(entries)
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
        f"model: {_model(config, model)}\n"
        f"samples: {len(entries)} ({', '.join(f'{name} {count}' for name, count in sorted(groups.items()))})\n"
        f"batches: {config.num_steps} steps of {config.global_batch_size} samples, {epochs:.1f} epochs; "
        f"on each of {ranks.world_size} ranks {len(cells)} micro-batches of {config.micro_batch_size} per step\n"
        f"{_memory(config, model, entries, ranks.world_size)}"
        f"run: {config.run}, {start}"
    )


def refuse_missing_libraries(config: TrainConfig) -> None:
    """Refuse what needs a library that is not installed, before minutes are spent on loading the model.

    Raises:
        ConfigError: With the command that installs it.
    """
    asked = [f"base: {config.base}"] if config.base == "nf4" else []
    asked += [f"optim.kind: {config.optim.kind}"] if config.optim.kind == "adamw8bit" else []
    if asked and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{' and '.join(asked)} needs bitsandbytes, which is not installed",
            'run `pip install "ccmdist[quant]"`, or set base=int8 or bf16 and optim.kind=adamw',
        )


def _model(config: TrainConfig, model: ModelFolder | None) -> str:
    """What is trained, in words."""
    if isinstance(config.objective, DiagnoseSettings):
        return _diagnosing(config.objective)
    if model is None:
        return f"{config.objective.kind} from scratch, on pixels"
    if config.objective.trains == "network":
        return f"{config.objective.kind} from scratch, on latents of the VAE at {config.data.model}"
    linears = "the linears"
    if model.layout.is_planned:
        transformer = Transformer.from_config(model.config("transformer"))
        linears = f"{len(list(transformer.adapted(config.adapter.targets)))} linears"
    return f"{model.title} at {config.data.model}, {_adapters(config, linears)}"


def _diagnosing(settings: DiagnoseSettings) -> str:
    """MDF-MLLM, in words."""
    trained = {"wdlora": "wdlora of rank", "lora": "lora of rank"}.get(settings.llm)
    llm = f"language model at {settings.mllm}, {f'{trained} {settings.lora_rank}' if trained else settings.llm}"
    if not settings.fusion_levels:
        return f"{llm}, bare"
    begun = "random weights" if settings.unet is None else str(settings.unet)
    return f"{llm}, reading levels {', '.join(map(str, settings.fusion_levels))} of a U-Net from {begun}"


def _adapters(config: TrainConfig, linears: str) -> str:
    """The adapter, or two, in words."""
    settings, objective = config.adapter, config.objective
    of_kind = f"{settings.kind} of rank {settings.lora_rank}"
    if growth := settings.growth:
        budget = "" if growth.rank_budget is None else f", at most {growth.rank_budget} ranks in all"
        return (
            f"adapter {system_of(settings)}: ranks of {linears} from {growth.start_rank} to "
            f"{settings.lora_rank}, one more where the Fisher ratio reaches {growth.fisher_ratio:g}, tested every "
            f"{growth.every_steps} steps{budget}"
        )
    if not isinstance(objective, DualSettings):
        return f"adapter {of_kind}"
    if len(objective.adapters) == 1:
        return f"adapter {of_kind} for {objective.adapters[0]} alone"
    return (
        f"two adapters {of_kind}, {' and '.join(objective.adapters)}: each step "
        f"trains one, {objective.completion_share:.0%} of them completion"
    )


def _entries(config: TrainConfig, model: ModelFolder | None) -> CachedSamples:
    if model is None:
        return ShardSamples(config.data, ("train",)).entries("train")
    return training_entries(config.data, model)


def _memory(config: TrainConfig, model: ModelFolder | None, entries: CachedSamples, num_ranks: int) -> str:
    """What the planner says of the memory of each GPU, all of them on one node; nothing where no base is frozen."""
    if config.objective.trains == "network" or model is None or not model.layout.is_planned:
        return ""
    of = tokens_of(config, model.version, int(entries.num_text_tokens.max()))
    transformer = Transformer.from_config(model.config("transformer"))
    if config.sharding == "auto":
        return needs_line(needed(config, transformer, of, num_ranks, num_ranks)) + "\n"
    sharding = mode_as_set(config.sharding, num_ranks, num_ranks).sharding
    needs = {sharding: memory(config, transformer, of, sharding, num_ranks, num_ranks)}
    return needs_line(needs, is_set=True) + "\n"


def training_entries(data: DataSettings, model: ModelFolder) -> CachedSamples:
    """The cached samples of the train split, found without opening a tar.

    Raises:
        CacheError: If no cache fits, or shards are missing in it.
    """
    manifest = read_manifest(data.shards)
    folder, _ = find_cache(data, manifest.digest, model.encoder_identity())
    found = indexes(folder, manifest.of_split("train"), data)
    return CachedSamples(entry for index in found for entry in index.entries)
