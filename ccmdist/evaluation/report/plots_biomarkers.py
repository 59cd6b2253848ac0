"""The plots of the second pillar: adherence beside chance, limits of agreement, equivalence, subjects as violins."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import QUANTITIES, Quantity
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.ccm.skeleton import Floats
from ccmdist.evaluation.biomarkers.agreement import BlandAltman
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
from ccmdist.evaluation.columns import FOUND, GIVEN
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.report.plot_style import BAND, INK, REAL_COLOUR, colour, figure_of, legend
from ccmdist.evaluation.statistics import subject_means

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIMIT: Final = 3.2
"""Of the axis of differences, in margins."""
SOFT_INK: Final = "#5a606a"
MIN_SUBJECTS_OF_VIOLIN: Final = 5
"""Below it a density says nothing that the dots do not."""
AGREEMENT_SHOWN: Final = ("cnfl", "cnfd", "cnbd", "cnfw")
NUM_COLUMNS: Final = 4


def biomarker_plots() -> "dict[str, Callable[[Comparison], Figure]]":
    """The plots by name, and how each is drawn."""
    return {
        "adherence": adherence_plot,
        "agreement": agreement_plot,
        "equivalence": equivalence_plot,
        "subjects": subjects_plot,
    }


def adherence_plot(comparison: Comparison) -> "Figure":
    """Dice and clDice of every image; the real ones show what the segmenter reaches, dashes what chance does."""
    figure, axes = figure_of(1, 2, 9.6, 0.7 + 0.34 * (1 + len(comparison.sets)), sharey=True)
    rows = [("real", REAL_COLOUR, comparison.table, comparison.segmenter_error)]
    rows += [(one.label, colour(index), one.table, one.adherence) for index, one in enumerate(comparison.sets)]
    for axis, column, title in zip(axes[0], ("dice", "cldice"), ("Dice", "clDice"), strict=True):
        for place, (_, shade, table, adherence) in enumerate(rows):
            values = np.sort(table[column].to_numpy())
            axis.plot(values, place + _spread(len(values), 0.5), "o", color=shade, ms=2.4, alpha=0.4, mew=0)
            axis.plot([getattr(adherence, column)] * 2, [place - 0.34, place + 0.34], color=shade, lw=2)
            chance = getattr(adherence.chance, column)
            axis.plot([chance] * 2, [place - 0.34, place + 0.34], color=INK, lw=1.2, ls=(0, (2, 1.5)))
        axis.set_title(title)
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rows)), [name for name, _, _, _ in rows])
    axes[0, 0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def _spread(num: int, width: float) -> Floats:
    """Sideways places of dots by their rank, so that the same data give the same picture."""
    return np.asarray((((np.arange(num) * 0.618) % 1) - 0.5) * width)


def agreement_plot(comparison: Comparison) -> "Figure":
    """Bland and Altman's plots: difference of found and wanted over their mean, for each set and some biomarkers."""
    columns = [("real", REAL_COLOUR, comparison.table, comparison.segmenter_error.limits)]
    columns += [
        (one.label, colour(index), one.table, one.adherence.limits) for index, one in enumerate(comparison.sets)
    ]
    num_rows = len(AGREEMENT_SHOWN)
    figure, axes = figure_of(num_rows, len(columns), 9.6, 1.55 * num_rows, sharey="row", sharex="row")
    for row, name in enumerate(AGREEMENT_SHOWN):
        for axis, (_, shade, table, limits) in zip(axes[row], columns, strict=True):
            _draw_agreement(axis, table, name, limits[name], shade)
        axes[row, 0].set_ylabel(_titled(QUANTITIES[name]), fontsize=8.5)
    for axis, (label, shade, _, _) in zip(axes[0], columns, strict=True):
        # What a control is goes below its name: columns are narrow.
        axis.set_title(label.replace(" (", "\n("), color=shade)
    figure.supxlabel("mean of found and of mask", fontsize=9, color=SOFT_INK)
    figure.supylabel("found minus mask", fontsize=9, color=SOFT_INK)
    return figure


def _draw_agreement(axis: "Axes", table: pd.DataFrame, name: str, limits: BlandAltman | None, shade: str) -> None:
    found, given = table[FOUND + name].to_numpy(), table[GIVEN + name].to_numpy()
    axis.axhline(0, color="#b9bec6", lw=0.8)
    axis.plot((found + given) / 2, found - given, "o", color=shade, ms=2.6, alpha=0.5, mew=0)
    if limits is None:
        axis.text(0.5, 0.9, "limits left out", transform=axis.transAxes, ha="center", fontsize=7.5, color=SOFT_INK)
        return
    for interval in (limits.bias_interval, limits.lower_interval, limits.upper_interval):
        axis.axhspan(*interval, color=shade, alpha=0.1, lw=0)
    axis.axhline(limits.bias, color=shade, lw=1.6)
    for limit in (limits.lower, limits.upper):
        axis.axhline(limit, color=shade, lw=1, ls=(0, (4, 2)))


def _titled(quantity: Quantity) -> str:
    return f"{quantity.label}, {quantity.unit}" if quantity.unit else quantity.label


def equivalence_plot(comparison: Comparison) -> "Figure":
    """Differences in units of the margin with intervals, the thick one paired; equivalent where within the band."""
    tested = {row.clinical_group for one in comparison.sets for row in one.equivalence}
    groups = [ALL_SUBJECTS, *(group for group in CLINICAL_GROUPS if group in tested)]
    names = list(comparison.config.margins)
    figure, axes = figure_of(1, len(groups), 9.6, 0.55 + 0.36 * len(names), sharey=True)
    for axis, group in zip(axes[0], groups, strict=True):
        axis.axvspan(-1, 1, color=BAND, lw=0)
        axis.axvline(0, color="#b8c6bb", lw=0.8)
        for index, one in enumerate(comparison.sets):
            _draw_intervals(axis, one, group, names, index, len(comparison.sets))
        axis.set_title("all subjects" if group == ALL_SUBJECTS else group)
        axis.set_xlim(-LIMIT, LIMIT)
        axis.set_xticks([-3, -2, -1, 0, 1, 2, 3])
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(names)), [QUANTITIES[name].label for name in names])
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("difference from real / margin", fontsize=9, color=SOFT_INK)
    legend(figure, comparison, with_real=False)
    return figure


def _draw_intervals(axis: "Axes", one: SetReport, group: str, names: list[str], index: int, num_sets: int) -> None:
    shift = (index - (num_sets - 1) / 2) * 0.6 / num_sets
    for row in one.equivalence:
        if row.clinical_group != group or row.biomarker not in names:
            continue
        place = names.index(row.biomarker) + shift
        thick = row.paired_interval or row.interval
        for interval, width, alpha in ((row.interval, 1.0, 0.45), (thick, 2.2, 1.0)):
            ends = np.clip(np.array(interval) / row.margin, -LIMIT, LIMIT)
            axis.plot(ends, [place, place], color=colour(index), lw=width, alpha=alpha, solid_capstyle="butt")
        middle = row.difference / row.margin
        inside = abs(middle) < LIMIT
        marker = "o" if inside else ">" if middle > 0 else "<"
        axis.plot(np.clip(middle, 0.1 - LIMIT, LIMIT - 0.1), place, marker, color=colour(index), ms=3.8)


def subjects_plot(comparison: Comparison) -> "Figure":
    """Means of subjects of every biomarker, real and synthetic, by clinical group: a violin and its dots."""
    names = list(comparison.config.margins)
    num_rows = -(-len(names) // NUM_COLUMNS)
    figure, axes = figure_of(num_rows, NUM_COLUMNS, 9.6, 2.3 * num_rows)
    present = [group for group in CLINICAL_GROUPS if (comparison.table["clinical_group"] == group).any()]
    tables = [(REAL_COLOUR, comparison.table), *((colour(i), one.table) for i, one in enumerate(comparison.sets))]
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_subjects(axis, tables, FOUND + name, present)
        axis.set_title(_titled(QUANTITIES[name]))
        axis.grid(axis="x", visible=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    legend(figure, comparison, with_real=True)
    return figure


def _draw_subjects(axis: "Axes", tables: list[tuple[str, pd.DataFrame]], column: str, present: Sequence[str]) -> None:
    width = 0.76 / len(tables)
    groups = list(present) or [""]
    for index, (shade, table) in enumerate(tables):
        for place, group in enumerate(groups):
            part = table[table["clinical_group"] == group] if present else table
            values = subject_means(part, column).to_numpy()
            if not len(values):
                continue
            centre = place + (index - (len(tables) - 1) / 2) * width
            if len(values) >= MIN_SUBJECTS_OF_VIOLIN and np.ptp(values) > 0:
                _draw_violin(axis, values, centre, 0.92 * width, shade)
            dots = centre + _spread(len(values), 0.45 * width)
            axis.plot(dots, values, "o", color=shade, ms=2.0, alpha=0.6, mew=0)
            axis.plot([centre - width * 0.36, centre + width * 0.36], [values.mean()] * 2, color=shade, lw=1.8)
    axis.set_xticks(range(len(groups)), present or ["all"])
    axis.set_xlim(-0.6, len(groups) - 0.4)


def _draw_violin(axis: "Axes", values: Floats, centre: float, width: float, shade: str) -> None:
    bodies: Any = axis.violinplot(values, [centre], widths=width, showextrema=False)["bodies"]
    for body in bodies:
        body.set(facecolor=shade, edgecolor="none", alpha=0.22)
