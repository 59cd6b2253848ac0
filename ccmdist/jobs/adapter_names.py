"""Which adapters there are and which of them is meant, as far as names and settings tell; imports no torch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, get_args

from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.loading import validate
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.objectives.choice import ObjectiveSettings
from ccmdist.config.objectives.objective import AdapterName
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.errors import AdapterError, ConfigError
from ccmdist.synthesis.trained_for import refuse_another_structure

NAMES: Final[tuple[AdapterName, ...]] = get_args(AdapterName)
MAX_DEPTH: Final = 3
"""Folders above RUN/adapter/completion, RUN/checkpoints/step-00001000 or RUN/best.json, at most, in which RUN lies."""


def chosen_name(there: Sequence[str], name: str | None, where: Path) -> str:
    """Which of the adapters ``there`` is meant: the one called ``name`` or, if no name is given, the only one.

    Raises:
        AdapterError: With the names there are.
    """
    chosen = there[0] if name is None and len(there) == 1 else name
    if chosen is None or chosen not in there:
        told = f"adapters {' and '.join(there)}" if there[1:] else f"adapter {there[0]}"
        what = f"none called {name}" if name else "and which of them is meant is not said"
        names = " or ".join(there)
        raise AdapterError(
            f"{where}: holds the {told}, {what}",
            f"name one that it holds: --name {names}; to `ccmdist synthesize`, --objective {names}",
        )
    return chosen


def is_of_a_network(path: Path, objective: ObjectiveSettings) -> AdapterError:
    """What is said where an adapter is wanted and ``path`` is of a run that trains a network from scratch."""
    return AdapterError(
        f"{path}: is of a {objective.kind} network, not of an adapter",
        "give it as network= to `ccmdist synthesize`" if objective.draws else objective.serves,
    )


def refuse_what_was_not_trained(config: SynthesizeConfig) -> None:
    """Check against the settings of its run, if the adapter lies in one, that it was trained for what is to be drawn.

    Raises:
        AdapterError: If the run has no adapter for an objective of the set.
        ConfigError: If in training something else stood for the nerves.
    """
    if config.adapter is None or (trained := _settings_above(config.adapter)) is None:
        return
    if trained.objective.trains != "adapter":
        raise is_of_a_network(config.adapter, trained.objective)
    there = trained.objective.adapters if isinstance(trained.objective, DualSettings) else NAMES[:1]
    for name in config.objectives:
        chosen_name(there, name, config.adapter)
    refuse_another_structure({"structure": trained.data.structure}, config)


def _settings_above(path: Path) -> TrainConfig | None:
    """The settings of the run that a path leads into; None if it leads into none."""
    for folder in (path, *path.parents[:MAX_DEPTH]):
        run = RunDirectory(folder)
        if run.config.is_file():
            try:
                return validate(TrainConfig, run.settings(), source=str(run.config))
            except (OSError, ValueError, ConfigError):
                return None  # whoever draws will say what is wrong with it
    return None
