"""Features of the images of a shard, extracted once."""

from ccmdist.evaluation.sets import OpenedSets
from ccmdist.evaluation.work import Unit


def units(sets: OpenedSets) -> list[Unit]:
    """Extracting the features of every shard of every set with every extractor of the settings."""
    return []
