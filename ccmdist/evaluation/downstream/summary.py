"""From the tested cells of the grid to the figures of the report.

The tests of all folds are pooled, each subject being tested in one of them, but areas under ROC curves compare images
of one fold alone; a score is the mean over the seeds.
Subjects and seeds are resampled, the same in every arm, so that arms are compared on the same people and from the same
first weights. An interval by subject alone would take the luck of a training for a merit of its images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Final

import numpy as np

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.skeleton import Floats
from ccmdist.config.arms import REAL, Arm
from ccmdist.config.evaluate import EvaluateConfig, Task
from ccmdist.evaluation.downstream.cells import PROBABILITIES, CellResult
from ccmdist.evaluation.downstream.grid import TaskGrid, planned
from ccmdist.evaluation.downstream.inference import delong, mcnemar, resampled, resampled_p
from ccmdist.evaluation.downstream.pooled import Pooled, pooled
from ccmdist.evaluation.downstream.scores import SEGMENTATION, diagnosis_scores, mean
from ccmdist.evaluation.left_out import LeftOut
from ccmdist.evaluation.sets import OpenedSets
from ccmdist.evaluation.statistics import holm, interval

PRIMARY: Final[dict[Task, str]] = {"diagnosis": "macro_auc", "segmentation": "dice"}
"""The score by which arms are compared."""


@dataclass(frozen=True)
class Score:
    """Mean over the seeds."""

    value: float
    interval: tuple[float, float]
    """By subject and seed."""
    seed_sd: float
    """Between the seeds."""


@dataclass(frozen=True)
class Difference:
    """From the arm of real images, in one score; p values of the hypothesis of none."""

    value: float
    interval: tuple[float, float]
    """By subject and seed, the same in both arms."""
    p: float
    p_holm: float
    """After Holm's correction over the arms of the task."""


@dataclass(frozen=True)
class ClassTest:
    """DeLong's test of one clinical group against the rest, on means of subjects and seeds."""

    clinical_group: str
    real_auc: float
    auc: float
    p: float
    p_holm: float
    """After Holm's correction over the arms and groups of the task."""


@dataclass(frozen=True)
class LearningCurve:
    """Mean over the cells of an arm, each with the learning rate that was chosen for it."""

    steps: list[int]
    training: list[float]
    validation: list[float]
    chosen_steps: list[int]
    """Of the networks that were tested, cell by cell."""


@dataclass(frozen=True)
class ArmResult:
    """One arm of a task."""

    arm: str
    name: str | None
    """Of the synthetic set, or phantom."""
    ratio: float | None
    is_shuffled: bool
    num_real: tuple[int, int]
    """Images that were trained on, in the smallest and the largest fold."""
    num_synthetic: tuple[int, int]
    scores: dict[str, Score]
    """Of images."""
    subject_scores: dict[str, Score]
    """Of subjects, by the mean of the probabilities of their frames; diagnosis only."""
    difference: Difference | None
    """In the task's primary score; None for the arm of real images."""
    mcnemar_p: float | None
    """Of subjects recognised, against the arm of real images; diagnosis only."""
    mcnemar_p_holm: float | None
    delong: list[ClassTest]
    curve: LearningCurve


@dataclass(frozen=True)
class ShownLook:
    """One test image of a cell, and where its network looked."""

    key: str
    clinical_group: str
    p_group: float
    """What the network gives for the group that it is of."""
    pictures: dict[str, str]
    """What they show, the frame itself first -> grey PNGs in base64."""


@dataclass(frozen=True)
class TaskSummary:
    """One task over all arms."""

    task: Task
    primary: str
    network: str
    num_parameters: int
    num_folds: int
    num_seeds: int
    num_steps: int
    num_images: int
    """That were tested, over all folds."""
    num_subjects: int
    subjects_by_group: dict[str, int]
    arms: list[ArmResult]
    looks: dict[str, list[ShownLook]]
    """By arm, where the network of the first fold and seed looked: the same test images in every arm."""


@dataclass(frozen=True)
class DownstreamSummary:
    """All figures of the downstream tasks."""

    tasks: list[TaskSummary]
    left_out: list[LeftOut]
    folds: list[dict[str, int]]
    """Real subjects of each fold by split."""
    level: float
    """Of the intervals."""
    size_px: int


@dataclass(frozen=True)
class _Resampled:
    """Scores of one arm in every resampling of subjects and seeds, the first being the score itself."""

    images: dict[str, Floats]
    subjects: dict[str, Floats]
    seed_sd: dict[str, float] = field(default_factory=dict)
    subject_seed_sd: dict[str, float] = field(default_factory=dict)


def summary_of(sets: OpenedSets) -> DownstreamSummary | None:
    """The figures of the grid; None if the settings want no downstream tasks. Does what cells are left.

    Raises:
        EvaluationError: If the generator of a fold has seen whom it tests, or a set does not say whom it has seen.
    """
    settings = sets.config.downstream
    if settings is None:
        return None
    grid = planned(sets, settings)
    splits = ("train", "val", "test")
    return DownstreamSummary(
        tasks=[_task_summary(sets.config, task) for task in grid.tasks],
        left_out=list(grid.left_out),
        folds=[{split: len(fold.subjects(split)) for split in splits} for fold in grid.folds],  # type: ignore[arg-type]
        level=1 - sets.config.alpha,
        size_px=settings.networks.size_px,
    )


def _task_summary(config: EvaluateConfig, grid: TaskGrid) -> TaskSummary:
    assert config.downstream is not None, "there is a grid"
    results = {arm.text: [cell.result() for cell in grid.cells if cell.arm == arm] for arm in grid.arms}
    cells = [cell for cell in grid.cells if cell.arm == grid.arms[0]]
    seeds, folds = [cell.seed_number for cell in cells], [cell.fold.number for cell in cells]
    pools = {text: pooled(grid.task, found, seeds, folds) for text, found in results.items()}
    pool = pools[REAL]
    rng = np.random.default_rng([config.seed, len(grid.task)])
    num = num_resamplings(config, len(grid.arms))
    weights = resampled(pool.subject_labels, num, rng)
    of_seeds = resampled(np.zeros(config.downstream.num_seeds, np.int64), num, rng)
    scored = {text: _scored(grid.task, pool, weights, of_seeds) for text, pool in pools.items()}
    arms = [_arm_result(config, grid.task, arm, results[arm.text], pools, scored) for arm in grid.arms]
    networks = config.downstream.networks
    return TaskSummary(
        task=grid.task,
        primary=PRIMARY[grid.task],
        network=networks.diagnosis if grid.task == "diagnosis" else "U-Net",
        num_parameters=results[REAL][0].num_parameters,
        num_folds=len({cell.fold.number for cell in grid.cells}),
        num_seeds=config.downstream.num_seeds,
        num_steps=networks.num_steps,
        num_images=len(pool.labels),
        num_subjects=len(pool.subjects),
        subjects_by_group=pool.subjects_by_group,
        arms=_corrected(arms),
        looks={text: looks for text, found in results.items() if (looks := _shown_looks(found[0]))},
    )


def num_resamplings(config: EvaluateConfig, num_arms: int) -> int:
    """Enough that the smallest p they can tell is below alpha after Holm's correction over the arms, by a factor of 5.

    With 1000 resamplings and 26 arms no difference whatever could be significant.
    """
    return max(config.num_bootstrap, ceil(10 * (num_arms - 1) / config.alpha))


def _scored(task: Task, pool: Pooled, weights: Floats, of_seeds: Floats) -> _Resampled:
    """Every score of an arm in every resampling: ``weights`` (B, M) of subjects, ``of_seeds`` (B, S)."""
    of_images = weights[:, pool.subject_of_image]
    if task == "segmentation":
        by_seed = {name: np.stack([mean(of_images, values) for values in pool.values[name]]) for name in SEGMENTATION}
        return _Resampled(_means(by_seed, of_seeds), {}, _spreads(by_seed))
    images = _by_seed(
        diagnosis_scores(of_images, pool.labels, found, pool.fold_of_image) for found in pool.probabilities
    )
    subjects = _by_seed(
        diagnosis_scores(weights, pool.subject_labels, found, pool.fold_of_subject) for found in pool.of_subjects
    )
    return _Resampled(_means(images, of_seeds), _means(subjects, of_seeds), _spreads(images), _spreads(subjects))


def _by_seed(scores: Iterable[Mapping[str, Floats]]) -> dict[str, Floats]:
    found = list(scores)
    return {name: np.stack([one[name] for one in found]) for name in found[0]}


def _means(by_seed: Mapping[str, Floats], of_seeds: Floats) -> dict[str, Floats]:
    """Mean over the seeds as often as they were drawn; values (S, B) -> (B,)."""
    return {name: (values * of_seeds.T).sum(0) / of_seeds.sum(1) for name, values in by_seed.items()}


def _spreads(by_seed: Mapping[str, Floats]) -> dict[str, float]:
    return {
        name: float(values[:, 0].std(ddof=1)) if len(values) > 1 else float("nan") for name, values in by_seed.items()
    }


def _arm_result(
    config: EvaluateConfig,
    task: Task,
    arm: Arm,
    results: Sequence[CellResult],
    pools: Mapping[str, Pooled],
    scored: Mapping[str, _Resampled],
) -> ArmResult:
    level, found, real = 1 - config.alpha, scored[arm.text], scored[REAL]
    is_real = arm.text == REAL
    return ArmResult(
        arm=arm.text,
        name=arm.name,
        ratio=arm.ratio,
        is_shuffled=arm.is_shuffled,
        num_real=_range(result.num_real for result in results),
        num_synthetic=_range(result.num_synthetic for result in results),
        scores=_scores(found.images, found.seed_sd, level),
        subject_scores=_scores(found.subjects, found.subject_seed_sd, level),
        difference=None if is_real else _difference(found.images, real.images, PRIMARY[task], level),
        mcnemar_p=None if is_real or task != "diagnosis" else _mcnemar(pools[REAL], pools[arm.text]),
        mcnemar_p_holm=None,
        delong=[] if is_real or task != "diagnosis" else _delong(pools[REAL], pools[arm.text]),
        curve=_curve(results),
    )


def _range(numbers: Any) -> tuple[int, int]:
    found = list(numbers)
    return min(found), max(found)


def _scores(values: Mapping[str, Floats], seed_sd: Mapping[str, float], level: float) -> dict[str, Score]:
    return {name: Score(float(found[0]), interval(found[1:], level), seed_sd[name]) for name, found in values.items()}


def _difference(found: Mapping[str, Floats], real: Mapping[str, Floats], name: str, level: float) -> Difference:
    differences = found[name] - real[name]
    return Difference(float(differences[0]), interval(differences[1:], level), resampled_p(differences[1:]), 1.0)


def _mcnemar(real: Pooled, other: Pooled) -> float:
    return mcnemar(*(pool.mean_of_subjects.argmax(1) == pool.subject_labels for pool in (other, real)))


def _delong(real: Pooled, other: Pooled) -> list[ClassTest]:
    found = []
    for label in np.unique(real.subject_labels):
        is_positive = real.subject_labels == label
        test = delong(
            is_positive, real.mean_of_subjects[:, label], other.mean_of_subjects[:, label], real.fold_of_subject
        )
        found.append(ClassTest(CLINICAL_GROUPS[label], test.first, test.second, test.p, 1.0))
    return found


def _curve(results: Sequence[CellResult]) -> LearningCurve:
    curves = [next(curve for curve in one.curves if curve["lr"] == one.lr) for one in results]
    return LearningCurve(
        steps=list(curves[0]["steps"]),
        training=[float(x) for x in np.mean([curve["training"] for curve in curves], axis=0)],
        validation=[float(x) for x in np.mean([curve["validation"] for curve in curves], axis=0)],
        chosen_steps=[one.step for one in results],
    )


def _in_order(pictures: Mapping[str, str]) -> dict[str, str]:
    """The frame, its saliency, and levels from fine to coarse; files hold them by name."""
    return dict(sorted(pictures.items(), key=lambda item: (item[0] != "frame", item[0] != "saliency", item[0])))


def _shown_looks(result: CellResult) -> list[ShownLook]:
    """Nothing of files that an earlier version has left, and of segmentation."""
    of_key = result.table.set_index("key")
    found = []
    for look in result.looks:
        row = of_key.loc[look["key"]]
        group = str(row["clinical_group"])
        column = PROBABILITIES[CLINICAL_GROUPS.index(group)]
        found.append(ShownLook(look["key"], group, float(row[column]), _in_order(look["pictures"])))
    return found


def _corrected(arms: list[ArmResult]) -> list[ArmResult]:
    """The arms with Holm's correction, for each kind of test over all arms."""
    differences = iter(holm([arm.difference.p for arm in arms if arm.difference]))
    recognised = iter(holm([arm.mcnemar_p for arm in arms if arm.mcnemar_p is not None]))
    known = iter(holm([test.p for arm in arms for test in arm.delong if np.isfinite(test.p)]))

    def corrected(arm: ArmResult) -> ArmResult:
        return replace(
            arm,
            difference=replace(arm.difference, p_holm=next(differences)) if arm.difference else None,
            mcnemar_p_holm=next(recognised) if arm.mcnemar_p is not None else None,
            delong=[replace(test, p_holm=next(known) if np.isfinite(test.p) else float("nan")) for test in arm.delong],
        )

    return [corrected(arm) for arm in arms]
