"""The plots of a report, as PNG bytes."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

from ccmdist.evaluation.comparison import Comparison
from ccmdist.evaluation.report.plot_style import STYLE
from ccmdist.evaluation.report.plots_biomarkers import biomarker_plots
from ccmdist.evaluation.report.plots_downstream import downstream_plots
from ccmdist.evaluation.report.plots_fidelity import distances_plot, noise_plot
from ccmdist.evaluation.report.plots_gate import gate_plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots(comparison: Comparison) -> dict[str, bytes]:
    """All plots by name: those of biomarkers, noise, distances, and those of the downstream tasks."""
    draw: dict[str, Callable[[Comparison], Figure]] = {
        **biomarker_plots(),
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
