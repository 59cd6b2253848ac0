"""The few figures of each set that a reader looks for first; each stands again, with all that belongs to it, below."""

from typing import Any

from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
from ccmdist.evaluation.fidelity.distances import label_of


def glance(values: dict[str, Any]) -> list[dict[str, Any]]:
    """One line per synthetic set.

    Args:
        values: Of report.json.

    Returns:
        Name, gate ("pass", "withhold" or None), clDice, verdicts counted over all subjects, the Frechet distance of the
        first extractor that has one, and for each downstream task the arm of real and synthetic images whose ratio is
        nearest to 1.
    """
    return [
        {
            "name": name,
            "control": one["control"],
            "gate": _gate(one),
            "cldice": one["adherence"]["cldice"],
            "verdicts": _verdicts(one),
            "distance": _distance(one),
            "tasks": [_arm(task, name) for task in (values["downstream"] or {"tasks": []})["tasks"]],
        }
        for name, one in values["synthetic"].items()
    ]


def _gate(one: dict[str, Any]) -> str | None:
    return None if one["gate"] is None else "pass" if one["gate"]["passed"] else "withhold"


def _verdicts(one: dict[str, Any]) -> dict[str, int]:
    rows = [row["verdict"] for row in one["equivalence"] if row["clinical_group"] == ALL_SUBJECTS]
    return {
        "tested": len(rows),
        "equivalent": sum(verdict.startswith("equivalent") for verdict in rows),
        "different": sum(verdict == "different" for verdict in rows),
    }


def _distance(one: dict[str, Any]) -> dict[str, Any] | None:
    for found in one["fidelity"]["distances"]:
        if found["metric"] == "frechet":
            return {**found, "label": label_of(found["metric"], found["extractor"])}
    return None


def _arm(task: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The arm that adds images of the set to real ones, nearest to as many; None if there is none."""
    arms = [
        arm
        for arm in task["arms"]
        if arm["name"] == name and arm["ratio"] and not arm["is_shuffled"] and arm["num_real"][1] and arm["difference"]
    ]
    return min(arms, key=lambda arm: abs(arm["ratio"] - 1), default=None)
