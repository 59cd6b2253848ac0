"""Submit a study: which picture stands best for the nerves, their mask, a map of points, or both in one."""

import sys
from typing import Annotated

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.jobs.launching import carry_out
from ccmdist.jobs.structure_study import run_here, study_of

app = typer.Typer(**SETTINGS)
EXAMPLE = (
    "python launch/structure_study.py precompute=configs/precompute/tiny.yaml train=configs/train/tiny.yaml "
    "train=configs/train/tiny_dual.yaml synthesize=configs/synthesize/tiny.yaml "
    "synthesize=configs/synthesize/tiny_completion.yaml evaluate=configs/evaluate/tiny.yaml "
    "evaluate=configs/evaluate/structure_study.yaml data.holes.per_sample=4 slurm.gpus_per_node=0 --dry-run"
)


@app.command(epilog=example(EXAMPLE))
def structure_study(
    arguments: Arguments = None,
    dry_run: DryRun = False,
    here: Annotated[
        bool, typer.Option("--here", help="Without Slurm: on this machine, one stage after another.")
    ] = False,
) -> None:
    """Train and draw with each structure (mask, points, mask_and_points), and compare the three sets in one report.

    The words are those of launch/pipeline.py. For each structure they make a chain of jobs (cache, training, drawing)
    whose run and set have the structure's name behind their own; the evaluation starts when all three have ended well.
    """
    words = arguments or []
    study = study_of(words)
    print(study.described())
    if here and not dry_run:
        for text in run_here(study):
            print(text, flush=True)
        return
    chains, last = study.jobs()
    for text in carry_out(last, words, dry_run, chains):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/structure_study.py"))
