"""Comparing synthetic sets with a real one: measured by any number of workers, compared by one."""

import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.ranks import ranks_from_environment, worker_from_environment
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import read_resolved
from ccmdist.console import log
from ccmdist.data.manifest import MANIFEST, read_manifest
from ccmdist.synthesis.plan import PLAN, read_plan

if TYPE_CHECKING:
    from ccmdist.evaluation.comparison import Adherence, Comparison
    from ccmdist.evaluation.fidelity.summary import FidelityReport


FORCED_EXIT_S = 3600.0
"""A shard is measured to its end before a stop signal is obeyed; after this long, the process ends itself."""


def run(config_path: str) -> None:
    """Measure what is left; compare, write report.json and report.html, and print the main figures.

    One of several workers measures its share and compares nothing: the same command alone, after them, does that.

    Raises:
        EvaluationError: If the sets cannot be compared.
        ShardError: If a shard is damaged.
        Preempted: If a stop signal came while there were shards left to measure.
    """
    config = read_resolved(EvaluateConfig, Path(config_path))
    worker_index, num_workers = worker_from_environment()
    # Before anything heavy is imported: a signal that comes meanwhile is obeyed as one between two shards.
    with StopFlag(FORCED_EXIT_S) as stop:
        from ccmdist.evaluation.comparison import compare, units
        from ccmdist.evaluation.report.write import write_report
        from ccmdist.evaluation.work import do_share

        if config.runs_networks:
            from ccmdist.cluster.device import take_device

            take_device(ranks_from_environment())
        do_share(units(config), worker_index, num_workers, should_stop=lambda: bool(stop))
    if num_workers > 1:
        told = "%s: worker %d of %d has done its share; the same command alone, after all, writes the report"
        log.info(told, config.out, worker_index, num_workers)
        return
    comparison = compare(config)
    path = write_report(comparison)
    _print_summary(comparison)
    _print_holes(comparison)
    _print_verdicts(comparison)
    sys.stdout.write(f"report: {path}\n")


def describe(config: EvaluateConfig) -> str:
    """What the command would compare."""
    from ccmdist.evaluation.comparison import units
    from ccmdist.evaluation.fidelity.extractors import chosen
    from ccmdist.evaluation.sets import open_sets
    from ccmdist.evaluation.work import open_units as open_ones

    sets, lines = open_sets(config), list[str]()
    for one in [sets.real, *sets.synthetic]:
        counts: Counter[str] = Counter()
        for entry in one.shards:
            counts.update(entry.group_counts)
        told = ", ".join(f"{group} {num}" for group, num in sorted(counts.items()))
        where = f"{one.name}: {one.folder}, split {one.split}"
        lines.append(f"{where}, {counts.total()} images of {len(one.subjects)} subjects ({told})")
    # Weights that are not where the settings say are told before anything is queued.
    lines += [f"extractor {one.name}, {one.dim} features" for one in chosen(config.extractors)]
    if config.downstream is not None:
        from ccmdist.evaluation.downstream.grid import describe as describe_grid

        lines += describe_grid(sets, config.downstream)
    every = units(config)
    lines.append(f"{len(open_ones(every))} of {len(every)} units of work are open; then the report in {config.out}")
    return "\n".join(lines)


def open_units(config: EvaluateConfig) -> int:
    """Shards that are not measured and trainings that are not done yet: so many workers have something to do.

    A synthetic set that is not complete has as many as its plan says, or, without a plan, is taken to have as many
    as the real one; and no training is left out then. Workers share whatever there is.

    Raises:
        CcmdistError: If the real set is not there, or the sets cannot be compared.
    """
    from ccmdist.evaluation.comparison import units
    from ccmdist.evaluation.sets import real_set
    from ccmdist.evaluation.work import open_units as open_ones

    grid = config.downstream
    folders = [*config.synthetic.values(), *(grid.folders if grid else [])]
    if all((folder / MANIFEST).is_file() for folder in folders):
        return len(open_ones(units(config)))
    num_real = len(real_set(config).shards)
    num_shards = num_real + sum(_expected_shards(config, folder, num_real) for folder in config.synthetic.values())
    return num_shards + (grid.num_cells(config.synthetic) if grid else 0)


def _expected_shards(config: EvaluateConfig, folder: Path, otherwise: int) -> int:
    if (folder / MANIFEST).is_file():
        return len(read_manifest(folder).of_split(config.split))
    return read_plan(folder).num_shards if (folder / PLAN).is_file() else otherwise


def _print_summary(comparison: "Comparison") -> None:
    """One line per synthetic set, and one for what the segmenter reaches on the real images."""
    from ccmdist.evaluation.biomarkers.equivalence import ALL_SUBJECTS
    from ccmdist.evaluation.fidelity.distances import label_of

    table = Table(title=f"nerves, biomarkers and fidelity against {comparison.real.folder} ({comparison.real.split})")
    # On a narrow terminal a long name takes two lines, and no figure is cut.
    table.add_column("set", overflow="fold")
    for heading in ("n", "Dice", "clDice", "CNFL\nbias", "equiv.", "SSIM", "Frechet", "real\nfloor"):
        table.add_column(heading, justify="right", no_wrap=True)
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
            *_fidelity(one.fidelity),
        )
    console = Console()
    console.print(table)
    if shown := next(filter(None, (one.fidelity.distance("frechet") for one in comparison.sets)), None):
        console.print(
            f"Frechet: {label_of(shown.metric, shown.extractor)} on {shown.extractor} {shown.extractor_sha256[:12]}, "
            f"between halves of the subjects at n = {shown.num_in_half}, as the real floor",
            soft_wrap=True,
        )


def _print_holes(comparison: "Comparison") -> None:
    """What fills the holes of repaired frames, for the table above speaks of whole images."""
    from ccmdist.evaluation.fidelity.fills import DRAWN, FILLS

    for one in comparison.sets:
        if one.completion is None:
            continue
        sys.stdout.write(
            f"holes: {one.completion.num_images} images of {one.name} are repaired frames; the figures above are of "
            "whole images, with real pixels. Inside the holes:\n"
        )
        for fill in (DRAWN, "biharmonic"):
            found = [one.completion.measure(fill, name) for name in ("ssim", "psnr_db", "filter_distance")]
            told = [f"{row.mean:.{decimals}f}" if row else "-" for row, decimals in zip(found, (3, 1, 3), strict=True)]
            # A hole that is the whole frame has no rim to continue: the two may be of different images.
            of = f" ({found[0].num_images} images)" if found[0] else ""
            sys.stdout.write(f"  {FILLS[fill]}{of}: SSIM {told[0]}, PSNR {told[1]} dB, filter distance {told[2]}\n")


def _print_verdicts(comparison: "Comparison") -> None:
    """The gate's verdict on each set, with its reasons."""
    for one in comparison.sets:
        if one.gate is not None:
            reasons = "".join(f"\n  {reason}" for reason in one.gate.reasons)
            sys.stdout.write(f"gate: {one.name} {'passes' if one.gate.passed else 'is withheld'}{reasons}\n")


def _fidelity(found: "FidelityReport") -> list[str]:
    similarity, distance = found.measure("ssim"), found.distance("frechet")
    halves = [f"{distance.of_halves:.2f}", f"{distance.floor:.2f}"] if distance else ["-", "-"]
    return [f"{similarity.mean:.2f}" if similarity else "-", *halves]


def _adherence(found: "Adherence") -> list[str]:
    told = [f"{found.dice:.2f}", f"{found.cldice:.2f}", f"{100 * found.bias['cnfl']:+.0f} %"]
    return ["-" if "nan" in figure else figure for figure in told]
