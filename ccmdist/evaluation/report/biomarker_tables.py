"""The tables of the second pillar, from the values of report.json to the lines of a page."""

from typing import Any

from ccmdist.ccm.biomarkers import QUANTITIES


def side_by_side(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """The equivalence rows of all sets, one line per clinical group and biomarker; a set that lacks it has None."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for place, one in enumerate(sets.values()):
        for row in one["equivalence"]:
            name = (row["clinical_group"], row["biomarker"])
            shared = {key: row[key] for key in ("clinical_group", "biomarker", "real_mean", "margin")}
            lines.setdefault(name, {"rows": [None] * len(sets), **shared})["rows"][place] = row
    order = list(QUANTITIES)
    return sorted(lines.values(), key=lambda line: order.index(line["biomarker"]))


def beside_their_controls(sets: dict[str, Any]) -> dict[str, Any]:
    """The same sets, each followed by those that were drawn to control it."""
    of = {name: (one["control"] or {}).get("of") for name, one in sets.items()}
    ordered = []
    for name in sets:
        if of[name] is None:
            ordered += [name, *(other for other in sets if of[other] == name)]
    return {name: sets[name] for name in ordered}
