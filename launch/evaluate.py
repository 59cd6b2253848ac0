"""Submit an evaluation: an array that measures shards, and a job after it that compares and reports."""

import sys

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.config.evaluate import EvaluateConfig
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.jobs.launching import carry_out, described, evaluate_jobs

app = typer.Typer(**SETTINGS)


@app.command(epilog=example("python launch/evaluate.py configs/evaluate/tiny.yaml slurm.partition=gpu --dry-run"))
def evaluate(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Compare synthetic sets with a real one, as a Slurm array and a last job. Section `slurm.`: launch/README.md."""
    words = arguments or []
    config, slurm = load_for_slurm(EvaluateConfig, *parted(words))
    print(described("evaluate", config, slurm))
    for text in carry_out(evaluate_jobs(config, slurm), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/evaluate.py"))
