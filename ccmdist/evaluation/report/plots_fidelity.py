"""The plots of the first pillar: noise against its real spread, and distances against their floors."""

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from ccmdist.ccm.skeleton import Floats
from ccmdist.errors import EvaluationError
from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.fidelity.appearance import GRAIN_COLUMNS, GRAIN_LAGS_PX, SPECTRUM_COLUMNS, SPECTRUM_EDGES
from ccmdist.evaluation.fidelity.distances import METRICS, Distance, Features, label_of, splits
from ccmdist.evaluation.report.plot_style import REAL_COLOUR, colour, figure_of, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FLOOR: Final = "#e3e6ea"
PANELS_PER_ROW: Final = 5


def noise_plot(comparison: Comparison) -> "Figure":
    """Power over frequency, its difference from real, and the grain's autocorrelation along both axes."""
    figure, axes = figure_of(1, 4, 9.6, 2.4, width_ratios=[1, 1, 0.8, 0.8])
    frequency = np.sqrt(np.array(SPECTRUM_EDGES[:-1]) * np.array(SPECTRUM_EDGES[1:]))
    along_x, along_y = GRAIN_COLUMNS[: len(GRAIN_LAGS_PX)], GRAIN_COLUMNS[len(GRAIN_LAGS_PX) :]
    lags = np.array(GRAIN_LAGS_PX, float)
    _curves(axes[0, 0], comparison, SPECTRUM_COLUMNS, frequency, is_difference=False)
    _curves(axes[0, 1], comparison, SPECTRUM_COLUMNS, frequency, is_difference=True)
    _curves(axes[0, 2], comparison, along_x, lags, is_difference=False)
    _curves(axes[0, 3], comparison, along_y, lags, is_difference=False)
    titles = ("log10 power", "synthetic minus real", "grain autocorrelation, x", "grain autocorrelation, y")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("px")
    for axis in axes[0, :2]:
        axis.set_xscale("log")
        axis.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
        axis.minorticks_off()
        axis.set_xlabel("cycles per px")
    legend(figure, comparison, with_real=True)
    return figure


def _curves(
    axis: "Axes", comparison: Comparison, columns: tuple[str, ...], places: Floats, is_difference: bool
) -> None:
    real = comparison.table[list(columns)].mean().to_numpy()
    middle = np.zeros_like(real) if is_difference else real
    spread = _between_halves(comparison.table, columns, comparison.config.seed)
    if spread is not None:
        axis.fill_between(places, middle + spread[0], middle + spread[1], color=FLOOR, lw=0)
    axis.plot(places, middle, color=REAL_COLOUR, lw=2)
    for index, one in enumerate(comparison.sets):
        curve = one.table[list(columns)].mean().to_numpy()
        axis.plot(places, curve - real if is_difference else curve, color=colour(index), lw=1.5)


def _between_halves(table: pd.DataFrame, columns: tuple[str, ...], seed: int) -> Floats | None:
    """5th and 95th percentile of the difference of two real halves, (2, columns); None with too few subjects."""
    real = Features(table[list(columns)].to_numpy(), table["subject"].to_numpy(str))
    try:
        halves = splits(real, real, 2, np.random.default_rng(seed))
    except EvaluationError:
        return None
    differences = [real.values[h.first].mean(axis=0) - real.values[h.second].mean(axis=0) for h in halves]
    return np.asarray(np.percentile(differences, [5, 95], axis=0))


def distances_plot(comparison: Comparison) -> "Figure":
    """Every distance between halves, over its real floor; one panel per extractor and metric."""
    panels: dict[tuple[str, str], list[tuple[int, Distance]]] = {}
    for index, one in enumerate(comparison.sets):
        for distance in one.fidelity.distances:
            panels.setdefault((distance.extractor, distance.metric), []).append((index, distance))
    num_rows = max(1, -(-len(panels) // PANELS_PER_ROW))
    height_in = 0.75 + 0.16 * len(comparison.sets)
    figure, axes = figure_of(num_rows, PANELS_PER_ROW, 9.6, 0.3 + height_in * num_rows)
    for axis, ((extractor, metric), rows) in zip(axes.flat, panels.items(), strict=False):
        _draw_distances(axis, rows, len(comparison.sets))
        axis.set_title(label_of(metric, extractor) + (" ↑" if METRICS[metric].higher_is_better else ""), fontsize=8)
        axis.set_xlabel(extractor, fontsize=6.5)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    legend(figure, comparison, with_real=True)
    return figure


def _draw_distances(axis: "Axes", rows: list[tuple[int, Distance]], num_sets: int) -> None:
    for index, distance in rows:
        axis.axvspan(*distance.floor_range, color=FLOOR, lw=0)
        axis.axvline(distance.floor, color=REAL_COLOUR, lw=1.2)
        axis.plot(distance.of_halves_range, [index, index], color=colour(index), lw=1.6, alpha=0.6)
        axis.plot(distance.of_halves, index, "o", color=colour(index), ms=4)
    axis.set_yticks([])
    axis.set_ylim(num_sets - 0.4, -0.6)
    axis.tick_params(axis="x", labelsize=7)
    axis.locator_params(axis="x", nbins=4)
