"""The grid of downstream trainings: task x fold x arm x seed, each cell a unit of work.

What cannot be done is left out as a whole, with the reason, before anything is trained: a task that has too few
subjects of a group in any fold, an arm that has too few images in any fold.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.config.arms import Arm
from ccmdist.config.evaluate import DownstreamSettings, Task
from ccmdist.data.reader import read_shard
from ccmdist.evaluation.downstream.cells import Cell
from ccmdist.evaluation.downstream.choice import chosen, usable
from ccmdist.evaluation.downstream.folds import Fold, Source, folds_of
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.sets import OpenedSets
from ccmdist.evaluation.stored import CELLS
from ccmdist.evaluation.work import Unit


@dataclass(frozen=True)
class TaskGrid:
    """The cells of one task."""

    task: Task
    arms: tuple[Arm, ...]
    """That have their images in every fold."""
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Grid:
    """All cells, and what cannot be done."""

    folds: tuple[Fold, ...]
    tasks: tuple[TaskGrid, ...]
    left_out: tuple[LeftOut, ...]


def units(sets: OpenedSets) -> list[Unit]:
    """Training and testing every cell of the grid.

    Raises:
        EvaluationError: If the generator of a fold has seen whom it tests, or a set does not say whom it has seen.
    """
    settings = sets.config.downstream
    return [cell for task in planned(sets, settings).tasks for cell in task.cells] if settings else []


def planned(sets: OpenedSets, settings: DownstreamSettings) -> Grid:
    """The cells in an order that every worker sees alike; reads manifests and fields of samples.

    Raises:
        EvaluationError: If the generator of a fold has seen whom it tests, or a set does not say whom it has seen.
    """
    folds = folds_of(sets, settings)
    tasks, left_out = [], []
    for task in settings.tasks:
        if reason := _why_not(task, folds, sets.config.minimum.downstream_test_subjects):
            left_out.append(LeftOut(task, reason))
            continue
        left_out += _unlabelled(task, folds)
        arms = []
        for arm in settings.arms_with(sets.config.synthetic):
            if reason := _too_few(task, arm, folds):
                left_out.append(LeftOut(f"{task}, arm {arm.text}", reason))
            else:
                arms.append(arm)
        tasks.append(_task_grid(sets, settings, task, folds, arms))
    return Grid(tuple(folds), tuple(tasks), tuple(left_out))


def describe(sets: OpenedSets, settings: DownstreamSettings) -> list[str]:
    """What the grid holds, a line for each task and for each figure that is left out.

    Raises:
        EvaluationError: As :func:`planned`.
    """
    grid, lines = planned(sets, settings), []
    for task in grid.tasks:
        arms = ", ".join(arm.text for arm in task.arms)
        size = f"{len(grid.folds)} folds x {settings.num_seeds} seeds x {len(task.arms)} arms"
        steps = settings.networks.num_steps
        lines.append(f"downstream, {task.task}: {len(task.cells)} trainings of {steps} steps, {size} ({arms})")
    return lines + [f"downstream, left out: {one.what}: {one.reason}" for one in grid.left_out]


def _task_grid(
    sets: OpenedSets, settings: DownstreamSettings, task: Task, folds: Sequence[Fold], arms: Sequence[Arm]
) -> TaskGrid:
    folder, seed = sets.config.out / CELLS, sets.config.seed
    cells = [
        Cell(folder, task, fold, arm, number, seed, settings.networks)
        for number in range(settings.num_seeds)
        for fold in folds
        for arm in arms
    ]
    return TaskGrid(task, tuple(arms), tuple(cells))


def _why_not(task: Task, folds: Sequence[Fold], min_subjects: int) -> str:
    """Why a task cannot be done at all; an empty text if it can."""
    everybody = {sample.subject for fold in folds for sample in fold.real.samples}
    if len(everybody) < 2:
        return f"there is {len(everybody)} subject, who cannot be trained on and tested"
    if task == "segmentation" and not any(_has_masks(fold.real) for fold in folds):
        return "no real frame has a nerve in its mask"
    groups = {sample.clinical_group for fold in folds for sample in usable(fold.real.samples, task)}
    if task == "diagnosis" and len(groups) < 2:
        return f"all subjects are of {groups.pop()}" if groups else "no subject has a clinical group"
    return next((reason for fold in folds if (reason := _too_small(task, fold, groups, min_subjects))), "")


def _too_small(task: Task, fold: Fold, groups: set[ClinicalGroup | None], min_subjects: int) -> str:
    validated = {sample.subject for sample in usable(fold.samples("val"), task)}
    if not validated:
        return f"fold {fold.number} has no subject to validate on"
    tested = {sample.subject: sample.clinical_group for sample in usable(fold.samples("test"), task)}
    if task == "segmentation":
        found = {"": len(tested)}
    else:
        counts = Counter(tested.values())
        found = {f" of {group}": counts[group] for group in CLINICAL_GROUPS if group in groups}
    for what, num in found.items():
        if num < min_subjects:
            return f"fold {fold.number} tests {num} subjects{what}, at least {min_subjects} are needed"
    trained = {sample.clinical_group for sample in usable(fold.samples("train"), task)}
    if missing := [group for group in CLINICAL_GROUPS if group in groups - trained]:
        return f"fold {fold.number} has no subject of {missing[0]} to train on" if task == "diagnosis" else ""
    return ""


def _has_masks(source: Source) -> bool:
    return any(
        triple.nerve_mask.any() for entry in source.manifest.shards for triple in read_shard(source.folder, entry)
    )


def _unlabelled(task: Task, folds: Sequence[Fold]) -> list[LeftOut]:
    without = sorted({one.subject for fold in folds for one in fold.real.samples if one.clinical_group is None})
    if task != "diagnosis" or not without:
        return []
    reason = f"{len(without)} subjects without a clinical group take no part (first: {without[0]})"
    return [LeftOut("diagnosis of unlabelled subjects", reason)]


def _too_few(task: Task, arm: Arm, folds: Sequence[Fold]) -> str:
    """Why an arm has not its images in every fold; an empty text if it has."""
    found = (chosen(fold, arm, task, 0) for fold in folds)
    return next((reason for reason in found if isinstance(reason, str)), "")
