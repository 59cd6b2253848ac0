"""The whole chain as one request: settings of each stage from one command line, and the jobs they make.

How large the later arrays must be is not known before the earlier stages have run. It is told from the masks that will
be drawn and the shards that will be measured; a few more or fewer workers than open units do no harm, because any
number of workers does what is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.data import DataSettings
from ccmdist.config.loading import load_for_slurm, resolved, validate
from ccmdist.config.settings import Settings
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.stages import CHAIN, STAGES
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.errors import ConfigError
from ccmdist.jobs.launching import Request, evaluate_jobs, precompute_jobs, synthesize_jobs, train_jobs

SHARED: Final = ("slurm", "data")
"""Sections that may be given once for all stages that have them."""
USAGE: Final = (
    "write STAGE=FILE.yaml, STAGE.key=value, slurm.key=value or data.key=value, "
    f"where STAGE is one of {', '.join(CHAIN)}"
)


@dataclass(frozen=True)
class Chain:
    """Settings of all stages, and of the jobs that are to run them.

    Attributes:
        configs: By the names of CHAIN.
        slurm: Likewise.
    """

    configs: dict[str, Any]
    slurm: dict[str, SlurmSettings]

    def jobs_before_evaluation(self) -> list[Request]:
        """Filling the cache, training and drawing.

        Raises:
            CcmdistError: If the shards or the model are not there.
        """
        configs, slurm = self.configs, self.slurm
        return [
            *precompute_jobs(configs["precompute"], slurm["precompute"]),
            *train_jobs(configs["train"], slurm["train"]),
            *synthesize_jobs(configs["synthesize"], slurm["synthesize"]),
        ]


def pipeline_jobs(arguments: Sequence[str]) -> list[Request]:
    """The jobs of all stages in order, from the words of a command line.

    Raises:
        ConfigError: If a word means no stage, a setting is wrong, or what one stage leaves is not what the next takes.
        CcmdistError: If the shards or the model are not there.
    """
    chain = connected(loaded(arguments))
    return [*chain.jobs_before_evaluation(), *evaluate_jobs(chain.configs["evaluate"], chain.slurm["evaluate"])]


def loaded(arguments: Sequence[str]) -> Chain:
    """The settings of each stage by itself, from the words of a command line.

    Raises:
        ConfigError: If a word means no stage, or a setting is wrong.
    """
    words = _by_stage(arguments)
    found = {stage: load_for_slurm(STAGES[stage], *words[stage]) for stage in CHAIN}
    configs = {stage: config for stage, (config, _) in found.items()}
    return Chain(configs, {stage: section for stage, (_, section) in found.items()})


def connected(chain: Chain) -> Chain:
    """The same, drawing with what is trained before unless something else is named.

    Raises:
        ConfigError: If what one stage leaves is not what the next takes.
    """
    configs = chain.configs | {"synthesize": _with_trained(chain.configs)}
    _refuse_gaps(configs)
    return Chain(configs, chain.slurm)


def _by_stage(arguments: Sequence[str]) -> dict[str, tuple[list[Path], list[str]]]:
    """Files and overrides of each stage; what is said to one stage wins over what is said to all."""
    files: dict[str, list[Path]] = {stage: [] for stage in CHAIN}
    shared: dict[str, list[str]] = {stage: [] for stage in CHAIN}
    own: dict[str, list[str]] = {stage: [] for stage in CHAIN}
    for word in arguments:
        name, is_set, value = word.partition("=")
        first, _, rest = name.partition(".")
        if first in CHAIN and is_set and not rest:
            files[first].append(Path(value))
        elif first in CHAIN and is_set:
            own[first].append(f"{rest}={value}")
        elif first in SHARED and is_set and rest:
            for stage in CHAIN:
                if first == "slurm" or first in STAGES[stage].model_fields:
                    shared[stage].append(word)
        else:
            raise ConfigError(f"'{word}' belongs to no stage", USAGE)
    return {stage: (files[stage], shared[stage] + own[stage]) for stage in CHAIN}


def _with_trained(configs: dict[str, Any]) -> Settings:
    """The settings of synthesis, with what is trained before it as its adapter or network unless another is named."""
    synthesize, run = configs["synthesize"], RunDirectory(configs["train"].run)
    if synthesize.adapter is not None or synthesize.network is not None:
        return cast(Settings, synthesize)
    trains = configs["train"].objective.trains
    trained = {trains: str(run.trained(trains))}
    return validate(SynthesizeConfig, resolved(synthesize) | trained, source="the command line")


def _refuse_gaps(configs: dict[str, Any]) -> None:
    """Refuse before days of computing what the next stage would not find."""
    filled: DataSettings = configs["precompute"].data
    for stage in ("train", "synthesize"):
        for field in DataSettings.model_fields:
            made, wanted = getattr(filled, field), getattr(configs[stage].data, field)
            if made != wanted:
                raise ConfigError(
                    f"{stage}.data.{field} is {wanted}, but precompute fills the cache for {made}",
                    f"give both the same, for instance with data.{field}=...",
                )
    drawn, compared = configs["synthesize"].out, configs["evaluate"]
    if drawn not in compared.synthetic.values():
        raise ConfigError(
            f"evaluate.synthetic names {', '.join(map(str, compared.synthetic.values()))}, but not {drawn}, which "
            "synthesize draws",
            f"set evaluate.synthetic.NAME={drawn}",
        )
    if compared.real != filled.shards:
        raise ConfigError(
            f"evaluate.real is {compared.real}, but the images are drawn for masks of {filled.shards}",
            f"set evaluate.real={filled.shards}",
        )
