"""Which images an arm trains on in a fold: real ones, and so many synthetic ones of each clinical group."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ccmdist.ccm.groups import CLINICAL_GROUPS, UNLABELLED, ClinicalGroup
from ccmdist.config.arms import PHANTOM, Arm
from ccmdist.config.evaluate import Task
from ccmdist.evaluation.downstream.folds import Fold, Sample, Source


@dataclass(frozen=True)
class Chosen:
    """Images to train on, without their pixels."""

    real: tuple[Sample, ...] = ()
    synthetic: tuple[Sample, ...] = ()
    source: Source | None = None
    """Of the synthetic ones."""
    num_phantoms: tuple[tuple[ClinicalGroup, int], ...] = ()
    """Of each clinical group."""

    @property
    def num_synthetic(self) -> int:
        """Synthetic images and phantoms."""
        return len(self.synthetic) + sum(num for _, num in self.num_phantoms)


def usable(samples: Sequence[Sample], task: Task) -> list[Sample]:
    """Those that say what the task has to learn: a diagnosis needs a clinical group."""
    return [sample for sample in samples if task != "diagnosis" or sample.clinical_group is not None]


def chosen(fold: Fold, arm: Arm, task: Task, seed: int) -> Chosen | str:
    """The images of an arm, or why there are not enough of them: never silently fewer.

    Of each clinical group, R times as many synthetic as real images are taken, in an order that the seed draws; so
    the images of a small ratio are among those of a larger one. Images whose mask is of a subject that the fold
    validates or tests are never taken. An arm without real images takes all synthetic ones, or as many phantoms as
    there are real images.
    """
    real = tuple(usable(fold.samples("train"), task))
    if not real:
        return f"fold {fold.number} has no real image to train on"
    taken = real if arm.has_real else ()
    if arm.name is None:
        return Chosen(taken)
    counts = Counter(sample.clinical_group for sample in real)
    wanted = {group: round((arm.ratio or 1) * num) for group, num in counts.items()}
    if arm.name == PHANTOM:
        return Chosen(taken, num_phantoms=_phantoms(wanted))
    source = fold.synthetic[arm.name]
    if task == "segmentation" and not source.manifest.follows_masks:
        return f"{arm.name} was drawn from prompts alone, so its masks do not show the nerves of its images"
    held_out = fold.subjects("val") | fold.subjects("test")
    free = [sample for sample in usable(source.samples, task) if sample.subject not in held_out]
    if not arm.has_real:
        return Chosen(synthetic=tuple(free), source=source) if free else _too_few(fold, arm, None, 0, 1)
    found: list[Sample] = []
    for group, num in wanted.items():
        of_group = sorted((one for one in free if one.clinical_group == group), key=lambda one: _draw(seed, one.key))
        if len(of_group) < num:
            return _too_few(fold, arm, group, len(of_group), num)
        found += of_group[:num]
    return Chosen(taken, tuple(found), source)


def _too_few(fold: Fold, arm: Arm, group: ClinicalGroup | None, have: int, need: int) -> str:
    return (
        f"in fold {fold.number}, {arm.name} has {have} images of {group or UNLABELLED} whose masks are of no subject "
        f"that is validated or tested, {need} are needed"
    )


def _phantoms(wanted: dict[ClinicalGroup | None, int]) -> tuple[tuple[ClinicalGroup, int], ...]:
    """Phantoms have a group always: what is unlabelled is dealt out over all groups."""
    open_ones = wanted.get(None, 0)
    shares = {
        group: wanted.get(group, 0) + open_ones // len(CLINICAL_GROUPS) + (place < open_ones % len(CLINICAL_GROUPS))
        for place, group in enumerate(CLINICAL_GROUPS)
    }
    return tuple((group, num) for group, num in shares.items() if num)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}/{key}".encode()).digest()
