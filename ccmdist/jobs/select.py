"""Choosing a checkpoint of a run: each one draws the same held-out masks, and the best by one figure is pointed at.

RUN/selection/
  step-00000040/    what the checkpoint of that step drew: a synthetic set as any other
  measures/         what was measured, one file per shard
  selection.json    every figure of every checkpoint
RUN/best.json       the choice

Any number of workers shares the work without talking to each other. Worker i of n begins with checkpoints ``i::n``
and then helps others, batch by batch. Whoever finds everything measured makes the choice; two who do so at once write
the same bytes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from ccmdist.cluster.best_checkpoint import BEST, BestCheckpoint
from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.ranks import ranks_from_environment, worker_from_environment
from ccmdist.cluster.run_directory import CHECKPOINTS, step_of
from ccmdist.commit import commit_json
from ccmdist.config.loading import read_resolved, resolved
from ccmdist.config.select import SelectConfig
from ccmdist.console import log
from ccmdist.data.manifest import read_manifest
from ccmdist.errors import CheckpointError, EvaluationError, Preempted
from ccmdist.jobs.candidates import Candidates, open_candidates
from ccmdist.models.model_folder import ModelFolder
from ccmdist.synthesis.claims import order_of_help, share
from ccmdist.synthesis.plan import NF4, PLAN, read_plan, refuse_other_set
from ccmdist.synthesis.planning import expected_batches, make_plan

if TYPE_CHECKING:
    import pandas as pd

    from ccmdist.evaluation.selection import Figures

FORCED_EXIT_S = 3600.0
"""A batch is drawn, or a shard measured, to its end before a stop signal is obeyed; after this long, force ends it."""
SELECTION: Final = "selection.json"
OF_THE_PLACE: Final = ("run", "out", "data")
"""Settings that say where things are, and not what is compared."""


def run(config_path: str) -> None:
    """Draw and measure what is left; choose, if that was all.

    Raises:
        EvaluationError: If there is nothing to choose from or by, or a checkpoint is broken.
        RunError: If the folder holds images that were drawn with other settings.
        Preempted: If a stop signal came while there was work left.
    """
    config = read_resolved(SelectConfig, Path(config_path))
    worker_index, num_workers = worker_from_environment()
    # Before anything heavy is imported: a signal that comes meanwhile is obeyed as one between two batches.
    with StopFlag(FORCED_EXIT_S) as stop:
        from ccmdist.cluster.device import take_device

        candidates = open_candidates(config)
        take_device(ranks_from_environment())
        try:
            do_share(candidates, worker_index, num_workers, lambda: bool(stop))
        except Preempted:
            num_done = sum(map(candidates.is_measured, candidates.checkpoints))
            raise Preempted(
                f"select: stopped with {num_done} of {len(candidates.checkpoints)} checkpoints drawn and measured; "
                "what else is drawn is committed too",
                "run the same command again",
            ) from None
    if not all(unit.is_done() for unit in candidates.units(None)) or _open(candidates):
        log.info("%s: others are still at work, and the last of them chooses", config.folder)
        return
    conclude(candidates)


def do_share(candidates: Candidates, worker_index: int, num_workers: int, should_stop: Callable[[], bool]) -> None:
    """Draw and measure this worker's checkpoints, then what others have left.

    Raises:
        EvaluationError: If a checkpoint is broken; all others are drawn first.
        Preempted: If ``should_stop`` said so while there was work left.
    """
    from ccmdist.evaluation import work

    work.do_share(candidates.units(None), worker_index, num_workers, should_stop)
    broken: dict[Path, str] = {}
    num, own = len(candidates.checkpoints), set(share(len(candidates.checkpoints), worker_index, num_workers))
    for number in [*sorted(own), *order_of_help(num, worker_index, num_workers)]:
        checkpoint = candidates.checkpoints[number]
        # Of its own ones it makes sure that what lies there was drawn by this checkpoint.
        is_done = number not in own and candidates.is_measured(checkpoint)
        if is_done or checkpoint in broken or not checkpoint.is_dir():
            continue
        own.discard(number)
        try:
            _draw_and_measure(candidates, checkpoint, worker_index, num_workers, should_stop)
        except CheckpointError as error:
            broken[checkpoint] = str(error)
            log.warning("%s", error)
    work.do_share(candidates.units(None), 0, 1, should_stop)
    if left := [checkpoint for checkpoint in broken if checkpoint.is_dir()]:
        raise EvaluationError(
            f"{len(left)} of {num} checkpoints cannot be drawn with: {broken[left[0]]}",
            f"set it aside (mv {left[0]} {left[0]}.broken) and run the same command again",
        )


def _draw_and_measure(
    candidates: Candidates, checkpoint: Path, worker_index: int, num_workers: int, should_stop: Callable[[], bool]
) -> None:
    from ccmdist.evaluation import work
    from ccmdist.jobs.adapter import find
    from ccmdist.jobs.network import find_network
    from ccmdist.synthesis.generate import synthesize

    drawing = candidates.drawing(checkpoint)
    weights = find(checkpoint, drawing.objective) if candidates.weights == "adapter" else find_network(checkpoint)
    if synthesize(drawing, weights, worker_index, num_workers, should_stop):
        work.do_share(candidates.units(checkpoint), 0, 1, should_stop)


def _open(candidates: Candidates) -> list[Path]:
    """Checkpoints that are there and not measured."""
    return [one for one in candidates.checkpoints if one.is_dir() and not candidates.is_measured(one)]


def conclude(candidates: Candidates) -> None:
    """Write every figure and the pointer to the best checkpoint, and print both.

    Raises:
        EvaluationError: If the sets were drawn in different ways, or the metric could not be taken of any of them.
    """
    from ccmdist.evaluation.selection import best_step, figures_of

    config = candidates.config
    # Training may go on, and remove what is older than it keeps.
    checkpoints = [one for one in candidates.checkpoints if one.is_dir()]
    _refuse_unlike(candidates, checkpoints)
    frames = _table(candidates, None)
    real = figures_of(frames, None, config.alpha)
    found = {step_of(one): figures_of(_table(candidates, one), frames, config.alpha) for one in checkpoints}
    step = best_step({step: figures.value(config.metric) for step, figures in found.items()}, config.metric)
    commit_json(config.folder / SELECTION, _values(candidates, checkpoints, real, found, step))
    _print(config, real, found, step)
    if step is None:
        raise EvaluationError(
            f"{config.metric}: could not be taken of the images of any of {len(found)} checkpoints",
            f"look at {config.folder / SELECTION}; choose another metric, or a split with more images",
        )
    best = found[step]
    value, num_images = best.value(config.metric), best.adherence.num_images
    name = f"{CHECKPOINTS}/step-{step:08d}"
    pointer = BestCheckpoint(step, name, config.metric, value, num_images, best.num_subjects).commit(config.run)
    sys.stdout.write(f"best: step {step}, {config.metric} {value:.4g}; use it as {candidates.weights}={pointer}\n")


def _table(candidates: Candidates, checkpoint: Path | None) -> "pd.DataFrame":
    import pandas as pd

    return pd.concat(
        [unit.measuring.table(unit.images, unit.entry) for unit in candidates.units(checkpoint)], ignore_index=True
    )


def _refuse_unlike(candidates: Candidates, checkpoints: list[Path]) -> None:
    by_base = {read_plan(candidates.out(one)).settings.base: one for one in checkpoints}
    if len(by_base) > 1:
        told = ", ".join(f"{candidates.out(one)} with base={base}" for base, one in sorted(by_base.items()))
        raise EvaluationError(
            f"checkpoints were not drawn alike: {told}", "say base=bf16 or base=nf4, and choose another out"
        )


def _values(
    candidates: Candidates, checkpoints: list[Path], real: "Figures", found: "dict[int, Figures]", best: int | None
) -> dict[str, Any]:
    from ccmdist.evaluation.selection import DEFINITIONS, figure_values

    sets = {step_of(one): read_manifest(candidates.out(one)) for one in checkpoints}
    metric = candidates.config.metric
    return {
        "settings": _compared(candidates.config),
        "definition": DEFINITIONS[metric],
        "masks": candidates.manifest.digest,
        "real": figure_values(real),
        "checkpoints": [
            {"step": step, "set": sets[step].digest, "weights": sets[step].about[f"{candidates.weights}_digest"]}
            | figure_values(figures)
            for step, figures in found.items()
        ],
        "best_step": best,
    }


def _compared(config: SelectConfig) -> dict[str, Any]:
    values = {name: value for name, value in resolved(config).items() if name not in OF_THE_PLACE}
    if not config.eta:
        del values["eta"]  # a choice made before there was one stays made
    return values


def _print(config: SelectConfig, real: "Figures", found: "dict[int, Figures]", best: int | None) -> None:
    console = Console()
    console.print(f"checkpoints of {config.run} on masks of split {config.split}, by {config.metric}", soft_wrap=True)
    table = Table()
    for heading in ("step", "n", "CNFL ICC", "CNFL bias", "equiv. margin", "clDice", ""):
        table.add_column(heading, justify="right")
    for name, figures in [("real", real), *((str(step), figures) for step, figures in found.items())]:
        adherence = figures.adherence
        numbers = [adherence.agreement["cnfl"], adherence.bias["cnfl"], figures.cnfl_equivalence, adherence.cldice]
        forms = ("{:.3f}", "{:+.1%}", "{:.1%}", "{:.3f}")
        told = [
            form.format(number) if number is not None and number == number else "-"
            for form, number in zip(forms, numbers, strict=True)
        ]
        table.add_row(name, str(adherence.num_images), *told, "best" if name == str(best) else "")
    console.print(table)
    if len(found) > 1:
        console.print("the best of several looks better than it is: report it on other masks", soft_wrap=True)


def describe(config: SelectConfig) -> str:
    """What the command would draw, and what of it is done. Does not look into the checkpoints.

    Raises:
        CcmdistError: If run, shards, model or cache are not there or do not fit, or the folder holds other images.
    """
    from ccmdist.evaluation.selection import DEFINITIONS

    candidates = open_candidates(config)
    num_batches = _num_batches(candidates)
    steps = ", ".join(str(step_of(one)) for one in candidates.checkpoints)
    num, num_done = len(candidates.checkpoints), sum(map(candidates.is_measured, candidates.checkpoints))
    keep = candidates.trained.checkpoint.keep
    return (
        f"{config.run}: {_told(num, 'checkpoint')} (step {steps}); the run keeps its newest {keep} and the chosen one; "
        "checkpoint.keep=20 keeps more\n"
        f"{config.folder}: each draws {candidates.num_images} images for masks of {candidates.num_subjects} subjects "
        f"({config.split} of {candidates.data.shards}) in {_told(num_batches, 'batch')}; "
        f"{num_done} of {num} are drawn and measured\n"
        f"{config.run / BEST}: by {config.metric}, {DEFINITIONS[config.metric]}"
    )


def _told(number: int, what: str) -> str:
    if number == 1:
        return f"1 {what}"
    return f"{number} {what}{'es' if what.endswith('h') else 's'}"


def _num_batches(candidates: Candidates) -> int:
    """That each draws, after a check that the sets that are begun have one plan but for their adapters."""
    first = candidates.drawing(candidates.checkpoints[0])
    if candidates.weights == "network":
        return expected_batches(first)  # the plan of a network takes its weights, and so torch
    model = ModelFolder.open(first.data.model)
    plan = make_plan(first, model, model.encoder_identity(), "(not read)", first.base if first.base != "auto" else NF4)
    for out in map(candidates.out, candidates.checkpoints):
        if (out / PLAN).exists():
            begun = read_plan(out).settings
            base = begun.base if first.base == "auto" else plan.settings.base
            settings = replace(plan.settings, adapter_digest=begun.adapter_digest, base=base)
            refuse_other_set(out, plan.model_copy(update={"settings": settings}))
    return len(plan.batches)


def open_units(config: SelectConfig) -> int:
    """Checkpoints that are not drawn or not measured yet: more workers than that help with batches only.

    Raises:
        CcmdistError: If there is nothing to choose from or by.
    """
    candidates = open_candidates(config)
    return len(_open(candidates)) or int(not _is_concluded(candidates))


def _is_concluded(candidates: Candidates) -> bool:
    """Whether the choice was made of these checkpoints, with these settings."""
    config = candidates.config
    try:
        values = json.loads((config.folder / SELECTION).read_text())
        steps = [one["step"] for one in values["checkpoints"]]
        is_same = values["settings"] == _compared(config) and steps == [step_of(one) for one in candidates.checkpoints]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return is_same and (config.run / BEST).is_file()
