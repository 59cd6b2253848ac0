"""Settings of the evaluation: what is compared with what, with which margins, and from how many images on."""

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from ccmdist.config.data import Split
from ccmdist.config.settings import Settings

DEFAULT_MARGINS = {
    "cnfd": 0.10,
    "cnbd": 0.20,
    "cnfl": 0.06,
    "ctbd": 0.20,
    "cnfa": 0.10,
    "cnfw": 0.10,
    "cnfrd": 0.03,
    "tortuosity": 0.10,
}


class MinimumCounts(Settings):
    """Images or subjects below which a figure is left out, with the reason, instead of printed."""

    frechet_images: int = Field(16, ge=2)
    equivalence_subjects: int = Field(3, ge=2)
    paired_images: int = Field(2, ge=1)


class EvaluateConfig(Settings):
    """`ccmdist evaluate`: real and synthetic shards in, report.json and report.html out."""

    out: Path
    """Folder of the report."""
    real: Path
    """Folder of the real (or phantom) shard set."""
    split: Split = "test"
    """Split of the real set that synthetic images are compared with."""
    synthetic: dict[str, Path] = Field(min_length=1)
    """Name and folder of each synthetic set; they share one table."""
    margins: dict[str, float] = DEFAULT_MARGINS
    """Equivalence margin of each biomarker as a fraction of the real mean. Ours: the paper's were not found."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    num_bootstrap: int = Field(1000, ge=100, le=100_000)
    num_grid_images: int = Field(6, ge=1, le=48)
    minimum: MinimumCounts = MinimumCounts()
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _margins_are_known_and_positive(self) -> Self:
        unknown = sorted(set(self.margins) - set(DEFAULT_MARGINS))
        if unknown:
            raise ValueError(f"margins: no biomarker named {unknown[0]!r}; known: {', '.join(DEFAULT_MARGINS)}")
        if bad := [name for name, margin in self.margins.items() if margin <= 0]:
            raise ValueError(f"margins.{bad[0]}: must be positive (got {self.margins[bad[0]]})")
        return self
