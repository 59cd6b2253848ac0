"""The stages that run as jobs of a cluster, and where each leaves its results."""

from pathlib import Path
from typing import Final

from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.select import SelectConfig
from ccmdist.config.settings import Settings
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig

STAGES: dict[str, type[Settings]] = {
    "precompute": PrecomputeConfig,
    "train": TrainConfig,
    "synthesize": SynthesizeConfig,
    "evaluate": EvaluateConfig,
    "select": SelectConfig,
}
CHAIN: Final = ("precompute", "train", "synthesize", "evaluate")
"""Those of which each needs what the one before it leaves."""


def result_folder(config: Settings) -> Path:
    """The folder in which a stage leaves its results, and its jobs their folders."""
    if isinstance(config, TrainConfig):
        return config.run
    if isinstance(config, PrecomputeConfig):
        return config.data.cache
    if isinstance(config, SelectConfig):
        return config.folder
    assert isinstance(config, SynthesizeConfig | EvaluateConfig), f"{type(config)} is not a stage"
    return config.out
