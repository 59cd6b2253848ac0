"""The stages that run as jobs of a cluster, and where each leaves its results."""

from pathlib import Path

from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.settings import Settings
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig

STAGES: dict[str, type[Settings]] = {
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "synthesize": SynthesizeConfig,
    "evaluate": EvaluateConfig,
}


def result_folder(config: Settings) -> Path:
    """The folder in which a stage leaves its results, and its jobs their folders."""
    if isinstance(config, TrainConfig):
        return config.run
    if isinstance(config, PrecomputeConfig):
        return config.data.cache
    assert isinstance(config, SynthesizeConfig | EvaluateConfig), f"{type(config)} is not a stage"
    return config.out
