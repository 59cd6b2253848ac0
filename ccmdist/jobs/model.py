"""Model folders that need no download."""

import tempfile
from pathlib import Path

from ccmdist.models.make import make_model
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.fit.run import FULL, QUICK
from ccmdist.train.fit.run import fit as fit_components


def make(size: str, version: str, out: Path, seed: int, fitted: bool) -> None:
    """Write a complete checkpoint folder with random or fitted weights."""
    make_model(size, version, out, seed, fitted)


def fit(out: Path, seed: int, quick: bool) -> None:
    """Fit the tiny VAE and MMDiT on phantoms; ``out`` gets what `model make --fitted` copies.

    The MMDiT learns with the text encoder of the random tiny model of seed 0, which fitted models have too.
    """
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        encoder_folder = Path(temporary) / "tiny"
        make_model("tiny", "2509", encoder_folder)
        fit_components(out, ModelFolder.open(encoder_folder), seed, QUICK if quick else FULL)
