"""Submit the drawing of a synthetic set: an array of workers of one GPU each, as many as there are batches left."""

import sys

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.jobs.launching import carry_out, described, synthesize_jobs

app = typer.Typer(**SETTINGS)


@app.command(epilog=example("python launch/synthesize.py configs/synthesize/tiny.yaml slurm.partition=gpu --dry-run"))
def synthesize(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Draw images for the masks of a shard set, as a Slurm array. Fields of the section `slurm.`: launch/README.md."""
    words = arguments or []
    config, slurm = load_for_slurm(SynthesizeConfig, *parted(words))
    print(described("synthesize", config, slurm))
    for text in carry_out(synthesize_jobs(config, slurm), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/synthesize.py"))
