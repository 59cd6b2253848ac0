"""Which subjects are trained on, which are validated on and which are tested on."""

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ccmdist.ccm.groups import UNLABELLED, ClinicalGroup
from ccmdist.config.data import Split
from ccmdist.errors import ConfigError


@dataclass(frozen=True)
class Subject:
    """What the split of a subject depends on."""

    clinical_group: ClinicalGroup | None
    num_frames: int


def assigned_splits(
    subjects: Mapping[str, Subject], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, Split]:
    """The split of each subject, a function of the arguments alone, whatever the order of ``subjects``.

    A fraction counts subjects, and those of every clinical group as far as whole subjects allow. Where there are
    enough, a fraction above zero gets at least one. A subject with more than half of all frames is never held out,
    and train is never empty unless there are no subjects.

    Args:
        subjects: By pseudonym.
        val_fraction: In [0, 1).
        test_fraction: In [0, 1); both together leave some for train.
        seed: Draws the subjects.

    Raises:
        ConfigError: If the fractions leave nothing for train.
    """
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing for train",
            "make their sum less than 1",
        )
    total = sum(subject.num_frames for subject in subjects.values())
    by_group: dict[str, list[str]] = {}
    for name in sorted(subjects, key=lambda name: _draw(seed, name)):
        if subjects[name].num_frames * 2 <= total:
            by_group.setdefault(subjects[name].clinical_group or UNLABELLED, []).append(name)
    splits: dict[str, Split] = dict.fromkeys(sorted(subjects), "train")
    held_out: tuple[tuple[Split, float], ...] = (("val", val_fraction), ("test", test_fraction))
    sizes = {group: len(names) for group, names in by_group.items()}
    for split, fraction in held_out:
        num_left = max(sum(split == "train" for split in splits.values()) - 1, 0)
        wanted = min(max(round(fraction * len(subjects)), 1 if fraction else 0), num_left)
        for group, count in _shares(
            sizes, {group: len(names) for group, names in by_group.items()}, fraction, wanted
        ).items():
            for _ in range(count):
                splits[by_group[group].pop()] = split
    return splits


def _shares(sizes: dict[str, int], available: dict[str, int], fraction: float, wanted: int) -> dict[str, int]:
    """How many of ``wanted`` each group gives: in proportion to its size, the rest from those who are owed most."""
    wanted = min(wanted, sum(available.values()))
    shares = {group: min(int(size * fraction), available[group]) for group, size in sizes.items()}
    while sum(shares.values()) > wanted:
        shares[max(shares, key=lambda group: (shares[group] - sizes[group] * fraction, group))] -= 1
    while sum(shares.values()) < wanted:
        open_groups = [group for group in sizes if shares[group] < available[group]]
        # A group is not emptied while another one can spare a subject.
        owed = {
            g: (available[g] - shares[g] > 1, sizes[g] * fraction - shares[g], available[g], g) for g in open_groups
        }
        shares[max(owed, key=lambda group: owed[group])] += 1
    return shares


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def stratified_parts(subjects: Mapping[str, Subject], num_parts: int, seed: int) -> dict[str, int]:
    """The part of each subject: parts alike in frames of every clinical group, as far as whole subjects allow.

    A function of the arguments alone, whatever the order of ``subjects``. A part may be empty where there are fewer
    subjects than parts.

    Args:
        subjects: By pseudonym.
        num_parts: Such as the folds of a cross-validation.
        seed: Draws the subjects.
    """
    frames_of_group = [Counter[str]() for _ in range(num_parts)]
    parts: dict[str, int] = {}
    # Those with most frames first, so that the small ones even out what they leave.
    for name in sorted(subjects, key=lambda name: (-subjects[name].num_frames, _draw(seed, name))):
        group = subjects[name].clinical_group or UNLABELLED
        part = min(range(num_parts), key=lambda part: (frames_of_group[part][group], frames_of_group[part].total()))
        frames_of_group[part][group] += subjects[name].num_frames
        parts[name] = part
    return dict(sorted(parts.items()))


def fold_splits(
    subjects: Mapping[str, Subject], fold: int, num_folds: int, seed: int, always_train: Collection[str] = ()
) -> dict[str, Split]:
    """The split of each subject in one fold of a cross-validation: every subject is tested in one fold.

    Of those that are not tested, a part of ``max(num_folds, 3)`` is validated on: at least one subject of each clinical
    group, however few there are.

    Args:
        subjects: By pseudonym.
        fold: Counted from 0.
        num_folds: Of the cross-validation.
        seed: Draws the subjects.
        always_train: Subjects that are trained on in every fold, and tested in none.
    """
    splits: dict[str, Split] = dict.fromkeys(sorted(subjects), "train")
    free = {name: subject for name, subject in subjects.items() if name not in always_train}
    outer = stratified_parts(free, num_folds, seed)
    rest = {name: subject for name, subject in free.items() if outer[name] != fold}
    splits |= {name: "test" for name, part in outer.items() if part == fold}
    for group in {subject.clinical_group for subject in rest.values()}:
        of_group = {name: subject for name, subject in rest.items() if subject.clinical_group == group}
        inner = stratified_parts(of_group, max(num_folds, 3), seed)
        splits |= {name: "val" for name, part in inner.items() if part == 0}
    return splits
