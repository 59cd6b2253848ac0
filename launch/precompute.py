"""Submit the encoding of a shard set: an array, with as many tasks as there are shards left."""

import sys

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.config.data import PrecomputeConfig
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.jobs.launching import carry_out, described, precompute_jobs

app = typer.Typer(**SETTINGS)


@app.command(epilog=example("python launch/precompute.py configs/precompute/tiny.yaml slurm.partition=gpu --dry-run"))
def precompute(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Encode masks, prompts and images once, as a Slurm array. Fields of the section `slurm.`: launch/README.md."""
    words = arguments or []
    config, slurm = load_for_slurm(PrecomputeConfig, *parted(words))
    print(described("precompute", config, slurm))
    for text in carry_out(precompute_jobs(config, slurm), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/precompute.py"))
