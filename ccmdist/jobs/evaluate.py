"""Comparing synthetic sets with a real one, as one process."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import read_resolved

if TYPE_CHECKING:
    from ccmdist.evaluation.comparison import Adherence, Comparison


def run(config_path: str) -> None:
    """Measure, compare, write report.json and report.html, and print the main figures.

    Raises:
        EvaluationError: If the sets cannot be compared.
        ShardError: If a shard is damaged.
    """
    from ccmdist.evaluation.comparison import compare
    from ccmdist.evaluation.report import write_report

    comparison = compare(read_resolved(EvaluateConfig, Path(config_path)))
    path = write_report(comparison)
    _print_summary(comparison)
    sys.stdout.write(f"report: {path}\n")


def describe(config: EvaluateConfig) -> str:
    """What the command would compare."""
    from ccmdist.evaluation.sets import real_set, synthetic_sets

    lines = []
    for one in [real_set(config), *synthetic_sets(config)]:
        counts: Counter[str] = Counter()
        for entry in one.shards:
            counts.update(entry.group_counts)
        num_subjects = len({subject for entry in one.shards for subject in entry.subjects})
        told = ", ".join(f"{group} {num}" for group, num in sorted(counts.items()))
        where = f"{one.name}: {one.folder}, split {one.split}"
        lines.append(f"{where}, {counts.total()} images of {num_subjects} subjects ({told})")
    return "\n".join(lines)


def _print_summary(comparison: "Comparison") -> None:
    """One line per synthetic set, and one for what the segmenter reaches on the real images."""
    from ccmdist.evaluation.appearance import EXTRACTOR
    from ccmdist.evaluation.biomarker_equivalence import ALL_SUBJECTS

    table = Table(title=f"nerves, biomarkers and fidelity against {comparison.real.folder} ({comparison.real.split})")
    for heading in ("set", "n", "Dice", "clDice", "CNFL bias", "equiv.", "SSIM", "Frechet", "real floor"):
        table.add_column(heading, justify="left" if heading == "set" else "right")
    real = comparison.segmenter_error
    table.add_row("real", str(real.num_images), *_adherence(real), "", "", "", "")
    for one in comparison.sets:
        rows = [row for row in one.equivalence if row.clinical_group == ALL_SUBJECTS]
        num_equivalent = sum(row.verdict.startswith("equivalent") for row in rows)
        table.add_row(
            one.name,
            str(one.adherence.num_images),
            *_adherence(one.adherence),
            f"{num_equivalent} of {len(rows)}" if rows else "-",
            f"{one.paired.ssim:.2f}" if one.paired else "-",
            f"{one.frechet.distance_of_halves:.2f}" if one.frechet else "-",
            f"{one.frechet.floor:.2f}" if one.frechet else "-",
        )
    console = Console()
    console.print(table)
    if any(one.frechet for one in comparison.sets):
        console.print(
            f"Frechet: {EXTRACTOR}, between halves of the subjects, as the real floor; no FID", soft_wrap=True
        )


def _adherence(found: "Adherence") -> list[str]:
    return [f"{found.dice:.2f}", f"{found.cldice:.2f}", f"{100 * found.bias['cnfl']:+.0f} %"]
