"""The plot of the gate: how near synthetic images come to training frames, beside held-out frames."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.memorisation.gate import BIN_EDGES, GateFigures, Nearness
from ccmdist.evaluation.report.plot_style import INK, REAL_COLOUR, colour, figure_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HELD_OUT: Final = "#c9cdd3"


def gate_plots(comparison: Comparison) -> "dict[str, Callable[[Comparison], Figure]]":
    """The plot by its name; none if no set was judged."""
    return {"nearness": nearness_plot} if any(one.gate and one.gate.figures for one in comparison.sets) else {}


def nearness_plot(comparison: Comparison) -> "Figure":
    """Of each judged set, the histogram of NCC with the nearest training frame, and the two limits."""
    judged = [
        (index, one.name, one.gate.figures)
        for index, one in enumerate(comparison.sets)
        if one.gate is not None and one.gate.figures is not None
    ]
    figure, axes = figure_of(len(judged), 1, 9.6, 0.5 + 1.15 * len(judged), sharex=True)
    for axis, (index, name, figures) in zip(axes[:, 0], judged, strict=True):
        _draw(axis, name, figures, colour(index))
    axes[-1, 0].set_xlabel("NCC with the nearest training frame, after registration")
    return figure


def _draw(axis: "Axes", name: str, figures: GateFigures, shade: str) -> None:
    edges = np.array(BIN_EDGES)
    axis.bar(
        edges[:-1], _shares(figures.held_out), np.diff(edges), align="edge", color=HELD_OUT, label="held-out frames"
    )
    axis.stairs(_shares(figures.synthetic), edges, color=shade, lw=1.6, label=name)
    axis.axvline(figures.share.limit, color=REAL_COLOUR, lw=1, ls=(0, (4, 2)), label="nearest held-out frame")
    axis.axvline(figures.copy_limit, color=INK, lw=1.2, label="from here on a copy")
    if figures.copies:
        # A bar of few images among many is too low to be seen.
        places = [row.ncc for row in figures.copies]
        axis.plot(places, np.zeros(len(places)), "|", color=shade, ms=12, mew=1.2, clip_on=False)
    axis.set_xlim(-0.1, 1.0)
    axis.set_yticks([])
    axis.set_ylabel("share")
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper right", fontsize=8, ncols=2)


def _shares(nearness: Nearness) -> "np.ndarray":
    return np.array(nearness.histogram) / nearness.num_images
