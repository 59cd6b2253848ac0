"""Submit the whole chain: precompute, train, synthesize, evaluate; each starts when the one before has ended well."""

import sys

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.jobs.launching import carry_out
from ccmdist.jobs.pipeline import pipeline_jobs

app = typer.Typer(**SETTINGS)
EXAMPLE = (
    "python launch/pipeline.py precompute=configs/precompute/tiny.yaml train=configs/train/tiny.yaml "
    "synthesize=configs/synthesize/tiny.yaml evaluate=configs/evaluate/tiny.yaml slurm.gpus_per_node=0 --dry-run"
)


@app.command(epilog=example(EXAMPLE))
def pipeline(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Run the whole chain as Slurm jobs; if one fails, those after it are cancelled.

    STAGE=FILE.yaml names the settings of a stage (repeatable), STAGE.key=value sets one of them, slurm.key=value asks
    for the same in all jobs, STAGE.slurm.key=value in one, and data.key=value names shards, model and cache for all.
    """
    words = arguments or []
    for text in carry_out(pipeline_jobs(words), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/pipeline.py"))
