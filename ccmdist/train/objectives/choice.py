"""Which objective a run learns: the one table. What an objective needs is imported when it is chosen."""

from collections.abc import Callable
from typing import Final

from ccmdist.cluster.process_group import ProcessGroup
from ccmdist.config.objectives.objective import ObjectiveKind
from ccmdist.config.train import TrainConfig
from ccmdist.train.objectives.objective import Objective


def objective_of(config: TrainConfig, group: ProcessGroup) -> Objective:
    """The objective that the settings name, its data opened and no weights read yet.

    Raises:
        CcmdistError: If its data are not there or do not fit.
    """
    return OBJECTIVES[config.objective.kind](config, group)


def _edit(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.edit import EditObjective

    return EditObjective(config, group)


def _dual(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.dual import DualObjective

    return DualObjective(config, group)


def _spade(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.spade import SpadeObjective

    return SpadeObjective(config, group)


def _maisi(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.maisi import MaisiObjective

    return MaisiObjective(config, group)


def _msdm_vae(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.msdm_vae import MsdmVaeObjective

    return MsdmVaeObjective(config, group)


def _msdm(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.msdm import MsdmObjective

    return MsdmObjective(config, group)


def _segment(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.segment import SegmentObjective

    return SegmentObjective(config, group)


def _diagnose(config: TrainConfig, group: ProcessGroup) -> Objective:
    from ccmdist.train.objectives.diagnose import DiagnoseObjective

    return DiagnoseObjective(config, group)


OBJECTIVES: Final[dict[ObjectiveKind, Callable[[TrainConfig, ProcessGroup], Objective]]] = {
    "edit": _edit,
    "dual": _dual,
    "spade": _spade,
    "maisi": _maisi,
    "msdm": _msdm,
    "msdm_vae": _msdm_vae,
    "segment": _segment,
    "diagnose": _diagnose,
}
