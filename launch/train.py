"""Submit a training run: one job of one process per GPU, which comes back by itself until all steps are done."""

import sys

import typer

from ccmdist.cli import SETTINGS, AllowChange, Arguments, DryRun, example, exit_code
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.config.train import TrainConfig
from ccmdist.jobs.launching import carry_out, described, train_jobs

app = typer.Typer(**SETTINGS)


@app.command(epilog=example("python launch/train.py configs/train/wdlora.yaml slurm.nodes=2 slurm.gpus_per_node=8"))
def train(arguments: Arguments = None, dry_run: DryRun = False, allow_change: AllowChange = None) -> None:
    """Train an adapter or a network as a Slurm job. Fields of the section `slurm.`: launch/README.md."""
    words = arguments or []
    config, slurm = load_for_slurm(TrainConfig, *parted(words))
    options = tuple(f"--allow-change={field}" for field in allow_change or ())
    print(described("train", config, slurm))
    for text in carry_out(train_jobs(config, slurm, options), words, dry_run):
        print(text)


if __name__ == "__main__":
    sys.exit(exit_code(sys.argv[1:], app, "launch/train.py"))
