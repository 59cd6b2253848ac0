"""Model folders that need no download."""

from pathlib import Path

from ccmdist.models.make import make_model


def make(size: str, version: str, out: Path, seed: int, fitted: bool) -> None:
    """Write a complete checkpoint folder with random or fitted weights."""
    make_model(size, version, out, seed, fitted)
