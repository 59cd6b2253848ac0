"""The report of a comparison: report.json with every number, and report.html, one file that needs nothing else."""

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ccmdist import __version__
from ccmdist.ccm.biomarkers import QUANTITIES
from ccmdist.ccm.groups import CLINICAL_GROUPS, UNLABELLED
from ccmdist.commit import commit_json, commit_text
from ccmdist.config.loading import resolved
from ccmdist.data.triple import Triple
from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
from ccmdist.evaluation.comparison import Comparison, SetReport
from ccmdist.evaluation.fidelity.appearance import APPEARANCE
from ccmdist.evaluation.measures import CHAIN_CODE, FOUND
from ccmdist.evaluation.report.conclusions import may_be_concluded, may_not_be_concluded
from ccmdist.evaluation.report.plots import colour, plots
from ccmdist.evaluation.sets import ImageSet

REPORT_JSON: Final = "report.json"
REPORT_HTML: Final = "report.html"
REPORT_VERSION: Final = 1
ABSENT: Final = "\u2013"
MINUS: Final = "\u2212"


def write_report(comparison: Comparison) -> Path:
    """Commit both files into the folder of the report; the path of the HTML file."""
    out = comparison.config.out
    values = report_values(comparison)
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
        "downstream": asdict(comparison.downstream) if comparison.downstream else None,
        "may_be_concluded": may_be_concluded(comparison),
        "may_not_be_concluded": may_not_be_concluded(comparison),
    }
    plain: dict[str, Any] = _plain(values)
    return plain


def _set_values(one: SetReport) -> dict[str, Any]:
    return {
        "counts": one.counts,
        "origins": one.origins,
        "shares_subjects": one.shares_subjects,
        "adherence": asdict(one.adherence),
        "equivalence": [asdict(row) for row in one.equivalence],
        "appearance": [asdict(row) for row in one.appearance],
        "paired": asdict(one.paired) if one.paired else None,
        "frechet": asdict(one.frechet) if one.frechet else None,
        "gate": asdict(one.gate) if one.gate else None,
        "left_out": [asdict(one) for one in one.left_out],
    }


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
    environment.filters |= {
        "number": number,
        "fixed": fixed,
        "percent": percent,
        "p_value": p_value,
        "signed": signed,
        "like": like,
    }
    return environment.get_template("page.html.j2").render(
        report=values,
        plots={name: _data_url(png) for name, png in plots(comparison).items()},
        grid=_grid(comparison),
        colours={one.name: colour(index) for index, one in enumerate(comparison.sets)},
        quantities=QUANTITIES,
        appearance_labels=APPEARANCE,
        all_subjects=ALL_SUBJECTS,
        groups=[ALL_SUBJECTS, *CLINICAL_GROUPS],
        level=round(100 - 200 * comparison.config.alpha),
        equivalence=_side_by_side(values["synthetic"]),
    )


def _side_by_side(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """The equivalence rows of all sets, one line per clinical group and biomarker; a set that lacks it has None."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for place, one in enumerate(sets.values()):
        for row in one["equivalence"]:
            name = (row["clinical_group"], row["biomarker"])
            shared = {key: row[key] for key in ("clinical_group", "biomarker", "real_mean", "margin")}
            lines.setdefault(name, {"rows": [None] * len(sets), **shared})["rows"][place] = row
    order = list(QUANTITIES)
    return sorted(lines.values(), key=lambda line: order.index(line["biomarker"]))


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits, and no exponent."""
    if value is None:
        return ABSENT
    if value == 0:
        return "0"
    return fixed(value, min(max(0, digits - 1 - math.floor(math.log10(abs(value)))), 6))


def fixed(value: float | None, decimals: int) -> str:
    """With so many decimals."""
    return ABSENT if value is None else f"{value:.{decimals}f}".replace("-", MINUS)


def like(value: float | None, scale: float | None) -> str:
    """With the decimals that show two digits of ``scale``, so that the numbers of a line can be compared."""
    return fixed(value, min(max(0, 1 - math.floor(math.log10(scale))), 6)) if scale else number(value)


def signed(value: float | None) -> str:
    """One decimal, and a sign in front of positive ones too."""
    text = fixed(value, 1)
    return f"+{text}" if value is not None and value > 0 else text


def percent(value: float | None) -> str:
    """A fraction as signed per cent."""
    return ABSENT if value is None else f"{100 * value:+.0f} %".replace("-", MINUS)


def p_value(value: float | None) -> str:
    """Three decimals, and nothing below a thousandth."""
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _grid(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows of the picture grid: mask and real frame, and what each set drew from that mask."""
    rows = []
    chosen = _chosen(comparison)
    real = _loaded(comparison.real, comparison.table, chosen["key"], comparison.shape)
    drawn = []
    for one in comparison.sets:
        of_key = one.table.drop_duplicates("source_key").set_index("source_key")["key"]
        keys = {key: of_key[key] for key in chosen["key"] if key in of_key}
        images = _loaded(one.images, one.table, keys.values(), comparison.shape)
        drawn.append({key: images[synthetic_key] for key, synthetic_key in keys.items()})
    for key, group in chosen[["key", "clinical_group"]].itertuples(index=False):
        pictures = [("mask", _picture(real[key].nerve_mask)), ("real", _picture(real[key].image))]
        for one, images in zip(comparison.sets, drawn, strict=True):
            pictures.append((one.name, _picture(images[key].image) if key in images else ""))
        rows.append({"key": key, "clinical_group": group or UNLABELLED, "pictures": pictures})
    return rows


def _chosen(comparison: Comparison) -> pd.DataFrame:
    """Real frames to show: first those that every set was drawn from, the clinical groups in turn, one per subject."""
    table = comparison.table.copy()
    drawn = sum(table["key"].isin(one.table["source_key"]).astype(int) for one in comparison.sets)
    table["missing"] = len(comparison.sets) - drawn
    table["repeat"] = table.groupby("subject").cumcount()
    table["turn"] = table.sort_values(["missing", "repeat"], kind="stable").groupby("clinical_group").cumcount()
    order = {group: place for place, group in enumerate([*CLINICAL_GROUPS, ""])}
    table["place"] = table["clinical_group"].map(order)
    chosen = table.sort_values(["turn", "place"], kind="stable").head(comparison.config.num_grid_images)
    return chosen.sort_values(["place", "turn"], kind="stable")


def _loaded(images: ImageSet, table: pd.DataFrame, keys: Iterable[str], shape: tuple[int, int]) -> dict[str, Triple]:
    """The samples with these keys; only their shards are read."""
    wanted = set(keys)
    shards = set(table.loc[table["key"].isin(wanted), "shard"])
    triples = (t for entry in images.shards if entry.name in shards for t in images.triples(entry, shape))
    return {triple.key: triple for triple in triples if triple.key in wanted}


def _picture(pixels: NDArray[Any]) -> str:
    buffer = io.BytesIO()
    # A mask keeps one bit per pixel, which makes the page a good deal smaller.
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return _data_url(buffer.getvalue())


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
