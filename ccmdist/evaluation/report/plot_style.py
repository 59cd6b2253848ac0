"""How plots of a report look: quiet, one colour per synthetic set, grey for the real one."""

from typing import TYPE_CHECKING, Any, Final

from ccmdist.evaluation.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REAL_COLOUR: Final = "#6b7280"
SET_COLOURS: Final = ("#2f6f9f", "#c8782e", "#4f8a5b", "#8a5a9e", "#b0494d", "#5f7f86")
BAND: Final = "#e6f0e8"
INK: Final = "#2b2f36"
LEGEND_WIDTH: Final = 120
"""Characters that one line of a legend holds."""
LEGEND_HANDLE: Final = 8
"""Of them, what the handle of an entry and the gap before it take."""
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


def figure_of(rows: int, columns: int, width_in: float, height_in: float, **options: Any) -> "tuple[Figure, Any]":
    """A figure and its axes, (rows, columns), that no global state of matplotlib knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it would keep figures and pick a backend for the process.
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def legend(figure: "Figure", comparison: Comparison, with_real: bool) -> None:
    """The sets by colour, beside the panels."""
    from matplotlib.lines import Line2D

    entries = [("real", REAL_COLOUR)] if with_real else []
    entries += [(one.label, colour(index)) for index, one in enumerate(comparison.sets)]
    handles = [Line2D([], [], color=shade, marker="o", ms=4, lw=1.6, label=name) for name, shade in entries]
    lines = 1 if sum(len(name) + LEGEND_HANDLE for name, _ in entries) <= LEGEND_WIDTH else 2
    figure.legend(handles=handles, loc="outside upper right", ncols=-(-len(handles) // lines), fontsize=9)
