"""Whom a generator has seen in training, as the manifest of what it draws tells it: written and read here alone."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from ccmdist.data.cache_index import UNKNOWN
from ccmdist.data.manifest import Manifest

UNTUNED: Final = "untuned"
"""Of a generator that was trained on none of our subjects."""
TRAINING: Final = "training"
"""Where a manifest tells it, among the settings that made the set."""
Training = str | dict[str, Any]
"""Of a generator: "untuned", or the digest of the set, the split and the subjects that it was trained on."""


def training_of(facts: Mapping[str, str] | None, source: Manifest) -> Training:
    """Whom a generator has seen in training, for the manifest of what it draws: nobody of them is to be tested.

    Args:
        facts: Of the adapter or network, "training_set_digest" and "training_split" among them; None if it is untuned.
        source: Manifest of the set whose masks are drawn from. The subjects are None if it was trained on another one.
    """
    if facts is None:
        return UNTUNED
    set_digest, split = facts.get("training_set_digest", UNKNOWN), facts.get("training_split", "train")
    subjects = sorted({subject for shard in source.shards if shard.split == split for subject in shard.subjects})
    return {"set_digest": set_digest, "split": split, "subjects": subjects if set_digest == source.digest else None}


def why_unknown(drawn: Manifest) -> str:
    """What a set says of its generator whose subjects cannot be told, as the rest of a sentence on the set."""
    training = drawn.about.get(TRAINING)
    if isinstance(training, dict) and training.get("set_digest", UNKNOWN) != UNKNOWN:
        trained_on = str(training["set_digest"])[:12]
        return f"was drawn by a generator trained on another set ({trained_on}), whose subjects it does not name"
    return "does not say on which subjects its generator was trained"


def subjects_trained_on(drawn: Manifest, known: Iterable[Manifest]) -> frozenset[str] | None:
    """The subjects that the generator of a set was trained on; none for an untuned one, None if it cannot be told.

    Args:
        drawn: Manifest of the set.
        known: Of real sets, one of which may be the one that it was trained on.
    """
    training = drawn.about.get(TRAINING)
    if training == UNTUNED:
        return frozenset()
    told = training if isinstance(training, dict) else {}
    if isinstance(subjects := told.get("subjects"), list):
        return frozenset(map(str, subjects))
    return _subjects_of(told.get("set_digest"), told.get("split"), known)


def subjects_behind(facts: Mapping[str, str], known: Iterable[Manifest]) -> frozenset[str] | None:
    """The subjects that a network itself was trained on; None if it cannot be told.

    Args:
        facts: Of the network, as of :func:`training_of`.
        known: Of real sets, one of which may be the one that it was trained on.
    """
    return _subjects_of(facts.get("training_set_digest"), facts.get("training_split"), known)


def _subjects_of(set_digest: Any, split: Any, known: Iterable[Manifest]) -> frozenset[str] | None:
    source = next((one for one in known if one.digest == set_digest), None)
    return source.subjects_of(split) if source and split else None
