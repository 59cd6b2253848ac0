"""The lines of the tables of the first pillar, off the values of the report; one that is not whole is not printed."""

from typing import Any

from ccmdist.evaluation.fidelity.distances import METRICS, whole


def paired_lines(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per paired measure, with what each set has of it, or None."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for place, one in enumerate(sets.values()):
        for row in one["fidelity"]["paired"]:
            shared = {name: row[name] for name in ("label", "measure", "of_blur", "num_real", "extractor")}
            shared["extractor_sha256"] = row["extractor_sha256"]
            name = (row["measure"], row["extractor"] or "")
            lines.setdefault(name, {"rows": [None] * len(sets), **shared})["rows"][place] = row
    return list(lines.values())


def distance_groups(sets: dict[str, Any]) -> list[dict[str, Any]]:
    """One group of lines per extractor; within it by metric, then by set.

    Raises:
        EvaluationError: If a distance lacks its counts, its extractor, the hash or the floor; then there is no table.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for set_name, one in sets.items():
        for row in whole(one["fidelity"]["distances"]):
            groups.setdefault((row["extractor"], row["extractor_sha256"]), []).append({**row, "set": set_name})
    order = list(METRICS)
    return [
        {
            "extractor": extractor,
            "sha256": sha256,
            "num_features": rows[0]["num_features"],
            "lines": sorted(
                ({**row, "higher_is_better": METRICS[row["metric"]].higher_is_better} for row in rows),
                key=lambda row: order.index(row["metric"]),
            ),
        }
        for (extractor, sha256), rows in groups.items()
    ]
