"""The plots of the third pillar: arms with their intervals, learning curves, and scores over the ratio."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from ccmdist.config.arms import PHANTOM, REAL
from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.downstream.summary import ArmResult, TaskSummary
from ccmdist.evaluation.report.plot_style import REAL_COLOUR, colour, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHANTOM_COLOUR: Final = "#a3875a"
LABELS: Final = {
    "macro_auc": "macro-AUC",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "calibration_error": "ECE",
    "dice": "Dice",
    "iou": "IoU",
    "cldice": "clDice",
}


def downstream_plots(comparison: Comparison) -> "dict[str, Callable[[Comparison], Figure]]":
    """Name of plot -> function that draws it; none where there was no grid, no ratios without several of them."""
    if comparison.downstream is None or not comparison.downstream.tasks:
        return {}
    found: dict[str, Callable[[Comparison], Figure]] = {"arms": arms_plot, "curves": curves_plot}
    if any(len(points) > 1 for task in comparison.downstream.tasks for points in _by_ratio(task).values()):
        found["ratios"] = ratios_plot
    return found


def arms_plot(comparison: Comparison) -> "Figure":
    """Score of every arm, and its difference from real images alone, with intervals by subject."""
    tasks = _tasks(comparison)
    most = max(len(task.arms) for task in tasks)
    figure, axes = figure_of(len(tasks), 2, 9.6, len(tasks) * (0.75 + 0.24 * most))
    for (left, right), task in zip(axes, tasks, strict=True):
        real = task.arms[0].scores[task.primary]
        left.axvspan(*real.interval, color="#eef0f2", lw=0)
        right.axvline(0, color=REAL_COLOUR, lw=1)
        for place, arm in enumerate(task.arms):
            shade, score = _colour(comparison, arm), arm.scores[task.primary]
            _interval(left, place, score.value, score.interval, shade, arm)
            if arm.difference:
                _interval(right, place, arm.difference.value, arm.difference.interval, shade, arm)
        left.set_title(f"{task.task}: {LABELS[task.primary]}")
        right.set_title("difference from real images alone")
        left.set_yticks(range(len(task.arms)), [arm.arm for arm in task.arms])
        right.set_yticks(range(len(task.arms)), [""] * len(task.arms))
        for axis in (left, right):
            axis.set_ylim(len(task.arms) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
    return figure


def curves_plot(comparison: Comparison) -> "Figure":
    """Losses over the steps, mean over folds and seeds: on real validation images, and thin in training."""
    tasks = _tasks(comparison)
    figure, axes = figure_of(1, len(tasks), 9.6, 2.8)
    for axis, task in zip(axes[0], tasks, strict=True):
        for arm in task.arms:
            look = {"color": _colour(comparison, arm), "ls": _dashes(arm), "alpha": _strength(task, arm)}
            axis.plot(arm.curve.steps, arm.curve.validation, lw=1.6, label=arm.arm, **look)
            axis.plot(arm.curve.steps, arm.curve.training, lw=0.7, **look)
        axis.set_title(f"{task.task}: loss on validation images (thin: in training)")
        axis.set_xlabel("optimizer step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    return figure


def ratios_plot(comparison: Comparison) -> "Figure":
    """Score over how many synthetic images there are for each real one; grey, real images alone."""
    tasks = _tasks(comparison)
    figure, axes = figure_of(1, len(tasks), 9.6, 2.6)
    for axis, task in zip(axes[0], tasks, strict=True):
        real = task.arms[0].scores[task.primary]
        axis.axhspan(*real.interval, color="#eef0f2", lw=0)
        axis.axhline(real.value, color=REAL_COLOUR, lw=1.6)
        ratios = sorted({arm.ratio or 1 for points in _by_ratio(task).values() for arm in points})
        for name, points in _by_ratio(task).items():
            shade, scores = _colour(comparison, points[0]), [arm.scores[task.primary] for arm in points]
            values = np.array([score.value for score in scores])
            ends = np.array([score.interval for score in scores]).T
            reach = np.clip([values - ends[0], ends[1] - values], 0, None)
            places = [arm.ratio for arm in points]
            axis.errorbar(places, values, reach, color=shade, marker="o", ms=4, lw=1.5, elinewidth=1, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        axis.minorticks_off()
        axis.set_title(f"{task.task}: {LABELS[task.primary]}")
        axis.set_xlabel("synthetic images per real one")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _tasks(comparison: Comparison) -> list[TaskSummary]:
    """The tasks, each with the arm of real images first."""
    assert comparison.downstream is not None, "plots are drawn where there was a grid"
    assert all(task.arms[0].arm == REAL for task in comparison.downstream.tasks), "real images are the first arm"
    return comparison.downstream.tasks


def _by_ratio(task: TaskSummary) -> dict[str, list[ArmResult]]:
    """Name of synthetic set -> its arms with real images, by ratio."""
    found: dict[str, list[ArmResult]] = {}
    for arm in sorted(task.arms, key=lambda arm: arm.ratio or 0):
        if arm.name and arm.ratio is not None and not arm.is_shuffled:
            found.setdefault(arm.name, []).append(arm)
    return found


def _colour(comparison: Comparison, arm: ArmResult) -> str:
    names = [one.name for one in comparison.sets]
    if arm.name == PHANTOM:
        return PHANTOM_COLOUR
    return colour(names.index(arm.name)) if arm.name in names else REAL_COLOUR


def _dashes(arm: ArmResult) -> str:
    """Dotted where labels were dealt out anew, dashed without real images or with augmented ones."""
    if arm.is_shuffled:
        return ":"
    return "-" if arm.arm == REAL or arm.ratio is not None else "--"


def _strength(task: TaskSummary, arm: ArmResult) -> float:
    """Opacity: of the arms of one set, the more synthetic images, the stronger."""
    ratios = [one.ratio for one in _by_ratio(task).get(arm.name or "", [])]
    return 1.0 if arm.ratio not in ratios else 0.35 + 0.65 * (ratios.index(arm.ratio) + 1) / len(ratios)


def _interval(
    axis: "Axes", place: int, value: float, interval: tuple[float, float], shade: str, arm: ArmResult
) -> None:
    axis.plot(interval, [place, place], color=shade, lw=2.2, solid_capstyle="butt")
    face = "white" if arm.is_shuffled else shade
    axis.plot(value, place, "s" if arm.name and arm.ratio is None else "o", color=shade, mfc=face, ms=4.4)
