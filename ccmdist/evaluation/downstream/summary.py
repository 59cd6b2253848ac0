"""From the tested cells of the grid to the figures of the report."""

from dataclasses import dataclass

from ccmdist.evaluation.sets import OpenedSets


@dataclass(frozen=True)
class DownstreamSummary:
    """All figures of the downstream tasks."""


def summary_of(sets: OpenedSets) -> DownstreamSummary | None:
    """The figures of the grid; None if the settings want no downstream tasks."""
    return None
