"""The report of a comparison: report.json with every number, and report.html, one file that needs nothing else."""

import math
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from ccmdist import __version__
from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.commit import commit_json, commit_text
from ccmdist.config.loading import digest, resolved
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
from ccmdist.evaluation.columns import CHAIN_CODE, FOUND
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.downstream.summary import DownstreamSummary
from ccmdist.evaluation.fidelity.appearance import APPEARANCE
from ccmdist.evaluation.fidelity.fills import FILLS
from ccmdist.evaluation.fidelity.in_hole import IN_HOLE
from ccmdist.evaluation.report.biomarker_tables import beside_their_controls, side_by_side
from ccmdist.evaluation.report.completion_pictures import repaired_frames
from ccmdist.evaluation.report.conclusions import may_be_concluded, may_not_be_concluded
from ccmdist.evaluation.report.contact_sheet import contact_sheets
from ccmdist.evaluation.report.fidelity_tables import distance_groups, paired_lines
from ccmdist.evaluation.report.formatting import FILTERS
from ccmdist.evaluation.report.glance import glance
from ccmdist.evaluation.report.pictures import HOLE_COLOUR, LINE_COLOURS, REACH_PX, data_url, picture_grids
from ccmdist.evaluation.report.plot_style import colour
from ccmdist.evaluation.report.plots import plots
from ccmdist.evaluation.report.plots_downstream import LABELS as DOWNSTREAM_LABELS
from ccmdist.evaluation.report.provenance import versions

REPORT_JSON: Final = "report.json"
REPORT_HTML: Final = "report.html"
REPORT_VERSION: Final = 1


def write_report(comparison: Comparison) -> Path:
    """Commit both files into the folder of the report; the path of the HTML file."""
    out = comparison.config.out
    values = report_values(comparison) | {"made_at": datetime.now(UTC).isoformat(timespec="seconds")}
    commit_json(out / REPORT_JSON, values)
    commit_text(out / REPORT_HTML, html(values, comparison))
    return out / REPORT_HTML


def report_values(comparison: Comparison) -> dict[str, Any]:
    """All numbers of the report as JSON types; a number that does not exist is null."""
    real = comparison.real
    values = {
        "report_version": REPORT_VERSION,
        "ccmdist_version": __version__,
        "settings": resolved(comparison.config),
        "settings_digest": digest(comparison.config),
        "packages": versions(),
        "versions": comparison.versions,
        "real": {
            "folder": str(real.folder),
            "kind": real.manifest.kind,
            "digest": real.manifest.digest,
            "split": real.split,
            "height_px": comparison.shape[0],
            "width_px": comparison.shape[1],
            **comparison.counts,
        },
        "segmenter_error": asdict(comparison.segmenter_error),
        "cnfl_chain_code": {
            name: float(table[FOUND + CHAIN_CODE].mean())
            for name, table in [("real", comparison.table), *((one.name, one.table) for one in comparison.sets)]
        },
        "synthetic": {one.name: _set_values(one) for one in comparison.sets},
        "downstream": _downstream_values(comparison.downstream) if comparison.downstream else None,
        "may_be_concluded": may_be_concluded(comparison),
        "may_not_be_concluded": may_not_be_concluded(comparison),
    }
    plain: dict[str, Any] = _plain(values)
    return plain


def _set_values(one: SetReport) -> dict[str, Any]:
    return {
        "digest": one.images.manifest.digest,
        "counts": one.counts,
        "origins": one.origins,
        "shares_subjects": one.shares_subjects,
        "num_reference_seen": one.num_reference_seen,
        "control": asdict(one.control) if one.control else None,
        "adherence": asdict(one.adherence),
        "equivalence": [asdict(row) for row in one.equivalence],
        "fidelity": asdict(one.fidelity),
        "completion": asdict(one.completion) if one.completion else None,
        "gate": asdict(one.gate) if one.gate else None,
        "left_out": [asdict(one) for one in one.left_out],
    }


def _downstream_values(summary: DownstreamSummary) -> dict[str, Any]:
    """Without pictures, which are no numbers."""
    values = asdict(summary)
    for task in values["tasks"]:
        del task["looks"]
    return values


def _plain(value: Any) -> Any:
    """The value in JSON types: NaN and infinity do not exist there."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


def html(values: dict[str, Any], comparison: Comparison) -> str:
    """The page; its pictures are in it, and it asks the network for nothing."""
    environment = Environment(
        loader=PackageLoader("ccmdist", "evaluation/report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS
    return environment.get_template("page.html.j2").render(
        report=values,
        plots={name: data_url(png) for name, png in plots(comparison).items()},
        glance=glance(values),
        grids=picture_grids(comparison),
        line_colours={name: f"rgb{rgb}" for name, rgb in LINE_COLOURS.items()},
        line_reach_px=REACH_PX,
        hole_colour=f"rgb{HOLE_COLOUR}",
        repaired=repaired_frames(comparison),
        fills=FILLS,
        in_hole=IN_HOLE,
        sheets=contact_sheets(comparison),
        colours={one.name: colour(index) for index, one in enumerate(comparison.sets)},
        quantities=QUANTITIES,
        appearance_labels=APPEARANCE,
        downstream_labels=DOWNSTREAM_LABELS,
        looks=[task.looks for task in comparison.downstream.tasks if task.looks] if comparison.downstream else [],
        paired_lines=paired_lines(values["synthetic"]),
        distance_groups=distance_groups(values["synthetic"]),
        all_subjects=ALL_SUBJECTS,
        groups=[ALL_SUBJECTS, *CLINICAL_GROUPS],
        level=round(100 - 200 * comparison.config.alpha),
        equivalence=side_by_side(values["synthetic"]),
        beside_their_controls=beside_their_controls(values["synthetic"]),
    )
