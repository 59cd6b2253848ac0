"""The plots of a report, as PNG bytes: quiet, one colour per synthetic set, grey for the real one."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS, subject_means
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.measures import FOUND

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REAL_COLOUR: Final = "#6b7280"
SET_COLOURS: Final = ("#2f6f9f", "#c8782e", "#4f8a5b", "#8a5a9e", "#b0494d", "#5f7f86")
BAND: Final = "#e6f0e8"
INK: Final = "#2b2f36"
LIMIT: Final = 3.2
"""Of the axis of differences, in margins."""
STYLE: Final[dict[str, Any]] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": "#c9cdd3",
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eef0f2",
    "grid.linewidth": 0.8,
    "xtick.color": "#5a606a",
    "ytick.color": "#5a606a",
    "text.color": INK,
    "legend.frameon": False,
    "figure.dpi": 160,
}


def colour(index: int) -> str:
    """Of the synthetic set with this place in the report."""
    return SET_COLOURS[index % len(SET_COLOURS)]


def plots(comparison: Comparison) -> dict[str, bytes]:
    """All plots by name: equivalence, subjects, adherence, noise, distances, and those of the downstream tasks."""
    from ccmdist.evaluation.report.plots_downstream import downstream_plots
    from ccmdist.evaluation.report.plots_fidelity import distances_plot, noise_plot
    from ccmdist.evaluation.report.plots_gate import gate_plots

    draw: dict[str, Callable[[Comparison], Figure]] = {
        "equivalence": equivalence_plot,
        "subjects": subjects_plot,
        "adherence": adherence_plot,
        "noise": noise_plot,
        "distances": distances_plot,
        **downstream_plots(comparison),
        **gate_plots(comparison),
    }
    return {name: _png(function, comparison) for name, function in draw.items()}


def _png(function: "Callable[[Comparison], Figure]", comparison: Comparison) -> bytes:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = function(comparison)
        buffer = io.BytesIO()
        # Without the library's version in it, equal figures are equal bytes.
        figure.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def figure_of(rows: int, columns: int, width_in: float, height_in: float, **options: Any) -> "tuple[Figure, Any]":
    """A figure and its axes, (rows, columns), that no global state of matplotlib knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would keep figures and pick a backend for the process.
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


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
    figure.supxlabel("difference from real / margin", fontsize=9, color="#5a606a")
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
    """Means of subjects of every biomarker, real and synthetic, by clinical group."""
    names = list(comparison.config.margins)
    num_columns = 4
    num_rows = -(-len(names) // num_columns)
    figure, axes = figure_of(num_rows, num_columns, 9.6, 2.15 * num_rows)
    present = [group for group in CLINICAL_GROUPS if (comparison.table["clinical_group"] == group).any()]
    tables = [(REAL_COLOUR, comparison.table), *((colour(i), one.table) for i, one in enumerate(comparison.sets))]
    for axis, name in zip(axes.flat, names, strict=False):
        _draw_subjects(axis, tables, FOUND + name, present)
        quantity = QUANTITIES[name]
        axis.set_title(f"{quantity.label}, {quantity.unit}" if quantity.unit else quantity.label)
        axis.grid(axis="x", visible=False)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    legend(figure, comparison, with_real=True)
    return figure


def _draw_subjects(axis: "Axes", tables: list[tuple[str, pd.DataFrame]], column: str, present: Sequence[str]) -> None:
    width = 0.72 / len(tables)
    groups = list(present) or [""]
    for index, (shade, table) in enumerate(tables):
        for place, group in enumerate(groups):
            part = table[table["clinical_group"] == group] if present else table
            values = subject_means(part, column).to_numpy()
            if not len(values):
                continue
            centre = place + (index - (len(tables) - 1) / 2) * width
            # Spread sideways by rank, so that the same data give the same picture.
            jitter = (((np.arange(len(values)) * 0.618) % 1) - 0.5) * width * 0.6
            axis.plot(centre + jitter, values, "o", color=shade, ms=2.2, alpha=0.45, mew=0)
            axis.plot([centre - width * 0.36, centre + width * 0.36], [values.mean()] * 2, color=shade, lw=2)
    axis.set_xticks(range(len(groups)), present or ["all"])
    axis.set_xlim(-0.6, len(groups) - 0.4)


def adherence_plot(comparison: Comparison) -> "Figure":
    """Dice and clDice of every image; the real ones show what the segmenter itself reaches."""
    figure, axes = figure_of(1, 2, 9.6, 0.7 + 0.34 * (1 + len(comparison.sets)), sharey=True)
    tables = [("real", REAL_COLOUR, comparison.table)]
    tables += [(one.name, colour(index), one.table) for index, one in enumerate(comparison.sets)]
    for axis, column, title in zip(axes[0], ("dice", "cldice"), ("Dice", "clDice"), strict=True):
        for place, (_, shade, table) in enumerate(tables):
            values = np.sort(table[column].to_numpy())
            jitter = (((np.arange(len(values)) * 0.618) % 1) - 0.5) * 0.5
            axis.plot(values, place + jitter, "o", color=shade, ms=2.4, alpha=0.4, mew=0)
            axis.plot([values.mean()] * 2, [place - 0.34, place + 0.34], color=shade, lw=2)
        axis.set_title(title)
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(tables)), [name for name, _, _ in tables])
    axes[0, 0].set_ylim(len(tables) - 0.5, -0.5)
    return figure


def legend(figure: "Figure", comparison: Comparison, with_real: bool) -> None:
    """The sets by colour, beside the panels."""
    from matplotlib.lines import Line2D

    entries = [("real", REAL_COLOUR)] if with_real else []
    entries += [(one.name, colour(index)) for index, one in enumerate(comparison.sets)]
    handles = [Line2D([], [], color=shade, marker="o", ms=4, lw=1.6, label=name) for name, shade in entries]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)
