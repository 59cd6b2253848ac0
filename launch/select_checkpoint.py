"""Submit the choice of a checkpoint: a low-priority array in which each worker draws with one and measures.

Not called select.py: Python looks into this folder first, and its own module of that name would not be found.
"""

import sys

import typer

from ccmdist.cli import SETTINGS, Arguments, DryRun, example, exit_code
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.config.select import SelectConfig
from ccmdist.jobs.launching import carry_out, described, select_jobs

app = typer.Typer(**SETTINGS)


@app.command(epilog=example("python launch/select_checkpoint.py configs/select/tiny.yaml run=runs/tiny --dry-run"))
def select(arguments: Arguments = None, dry_run: DryRun = False) -> None:
    """Choose the best checkpoint of a run, as a Slurm array of low priority. Section `slurm.`: launch/README.md."""
    words = arguments or []
    config, slurm = load_for_slurm(SelectConfig, *parted(words))
    print(described("select", config, slurm))
    for text in carry_out(select_jobs(config, slurm), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/select_checkpoint.py"))
