"""The grid of downstream trainings: task x fold x arm x seed, each cell a unit of work."""

from ccmdist.evaluation.sets import OpenedSets
from ccmdist.evaluation.work import Unit


def units(sets: OpenedSets) -> list[Unit]:
    """Training and testing every cell of the grid."""
    return []
