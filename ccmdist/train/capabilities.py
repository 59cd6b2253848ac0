"""Settings that a frozen model, or samples, cannot follow are refused before anything is trained; imports no torch."""

from collections.abc import Iterable

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.config.train import TrainConfig
from ccmdist.data.cache_index import CacheEntry
from ccmdist.errors import ConfigError
from ccmdist.models.mdf_base import check_base
from ccmdist.models.model_folder import ModelFolder


def refuse_unable(config: TrainConfig, folder: ModelFolder) -> None:
    """Check that the model in ``folder`` can be trained as the settings say.

    Raises:
        ConfigError: If its weights cannot be held in 4 or 8 bits, it cannot be shown so many condition images, or a
            budget of ranks is to be checked against a size that the planner does not know.
    """
    layout = folder.layout
    if config.is_quantized and not layout.can_quantize:
        raise ConfigError(
            f"base: {config.base} is for Qwen-Image-Edit alone, {folder.path} holds {folder.title}",
            "set base=bf16 or fp32",
        )
    if config.objective.completion_share and not layout.can_complete:
        raise ConfigError(
            f"objective.adapters: completion shows a model two condition images, {folder.title} takes 1",
            "set data.model to a folder of Qwen-Image-Edit, or train objective.kind edit",
        )
    if config.adapter.growth and config.adapter.growth.rank_budget is not None and not layout.is_planned:
        raise ConfigError(
            f"adapter.growth.rank_budget: cannot be checked for {folder.title}, whose size the planner does not know",
            "leave it out",
        )


def refuse_missing_groups(entries: Iterable[CacheEntry]) -> None:
    """Check that groups can be learnt from samples.

    Raises:
        ConfigError: If a sample has no group, or a group no sample.
    """
    present = set()
    for entry in entries:
        if entry.clinical_group is None:
            raise ConfigError(
                f"objective.kind diagnose: sample {entry.key} of subject {entry.subject} has no clinical group",
                "label it in the source table, or leave it out",
            )
        present.add(entry.clinical_group)
    if missing := [group for group in CLINICAL_GROUPS if group not in present]:
        raise ConfigError(
            f"objective.kind diagnose: no training sample is of group {', '.join(missing)}",
            "add frames of that group to the train split: what is never shown cannot be told",
        )


def refuse_missing_files(config: TrainConfig) -> None:
    """Check the local files and folders that the objective's settings name, without reading weights.

    Raises:
        ConfigError: If one is missing.
        ModelError: If it is not what it should be.
    """
    for name, path in config.objective.files.items():
        if not path.exists():
            fetched = "copy it there from a machine with internet, for nothing is fetched here"
            raise ConfigError(
                f"objective.{name}: {path} is not there",
                config.objective.made_by.get(name, fetched)
                + ("" if type(config.objective).model_fields[name].is_required() else "; or set it to null"),
            )
    if isinstance(config.objective, DiagnoseSettings):
        check_base(config.objective)
