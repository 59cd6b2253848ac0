"""The verdict on a synthetic set: may it be released."""

from dataclasses import dataclass

from ccmdist.evaluation.sets import ImageSet, OpenedSets


@dataclass(frozen=True)
class GateVerdict:
    """Pass or withhold, and why."""

    passed: bool
    reasons: tuple[str, ...]


def verdict_of(sets: OpenedSets, one: ImageSet) -> GateVerdict | None:
    """The verdict on one synthetic set; None if the settings want no gate."""
    return None
