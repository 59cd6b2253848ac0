"""Settings of the choice of a checkpoint: what is drawn with each one of a run, and by which figure one is chosen."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from ccmdist.config.data import DataSettings, Split
from ccmdist.config.settings import Settings

Metric = Literal["cnfl_agreement", "cnfl_bias", "cnfl_equivalence", "cldice"]


class SelectConfig(Settings):
    """`ccmdist select`: draw held-out masks with every checkpoint of a run, measure, and point at the best one."""

    run: Path
    """Folder of a training run, all of whose checkpoints take part: as many as its `checkpoint.keep` has left. Of two
    adapters, as objective `dual` trains them, synthesis draws, and its best step is pointed at for both."""
    out: Path | None = None
    """Folder of what is drawn and measured; by default RUN/selection. Other settings need another one."""
    data: DataSettings | None = None
    """Masks, prompts and model; by default those that the run was trained with."""
    split: Split = "val"
    """Whose masks are drawn. Choosing on the test split makes what is reported of it too good."""
    metric: Metric = "cnfl_agreement"
    """cnfl_agreement: ICC(2,1) of the CNFL found in the images with that of their masks; the highest.
    cnfl_bias: mean CNFL found over that of the masks, less 1; the nearest to 0.
    cnfl_equivalence: smallest margin at which CNFL of the images is equivalent to that of the real frames; the lowest.
    cldice: mean overlap of centrelines of the nerves found with those of the masks; the highest."""
    base: Literal["auto", "bf16", "nf4"] = "auto"
    """As of `ccmdist synthesize`. Where cards differ, say it: checkpoints are only compared if all are drawn alike."""
    images_per_mask: int = Field(1, ge=1, le=100)
    batch_size: int = Field(8, ge=1, le=1024)
    batches_per_shard: int = Field(4, ge=1)
    denoise_steps: int = Field(40, ge=2)
    guidance_scale: float = Field(4.0, ge=1)
    eta: float = Field(0.0, ge=0, le=1)
    """Of a run of MSDM, as of `ccmdist synthesize`: noise that is added anew at each denoise step."""
    compile_blocks: bool = False
    seed: int = Field(0, ge=0)
    """The same noise for every checkpoint: they are compared in pairs."""
    alpha: float = Field(0.05, gt=0, lt=0.5)
    """Of the equivalence test."""
    min_images: int = Field(3, ge=3)
    """Fewer than that, and nothing is drawn."""
    min_subjects: int = Field(3, ge=2)
    """Fewer than that, and nothing is drawn."""

    @property
    def folder(self) -> Path:
        """Of what is drawn and measured."""
        return self.out or self.run / "selection"
