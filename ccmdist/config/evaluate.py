"""Settings of the evaluation: what is compared with what, with which margins, and from how many images on."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ccmdist.config.arms import Arm, expanded
from ccmdist.config.data import Split
from ccmdist.config.objectives.mdf_mllm import UNET_FACTOR, DiagnoseSettings
from ccmdist.config.settings import Settings, free

SET_NAME: Final = r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}"
"""Of a synthetic set in tables and arms."""
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
    """Counts below which a figure is left out, with the reason, instead of printed; those of a demonstration."""

    frechet_images: int = Field(16, ge=2)
    """On either side, and in the halves of the subjects that give the floor: so of twice as many in all."""
    kernel_images: int = Field(16, ge=4)
    """Likewise, for KID and CMMD."""
    neighbour_images: int = Field(16, ge=6)
    """Likewise, for precision, recall, density and coverage."""
    noise_images: int = Field(8, ge=2)
    """Likewise, for the distances of power spectra and of the grain's autocorrelation."""
    equivalence_subjects: int = Field(3, ge=2)
    """On either side."""
    agreement_images: int = Field(3, ge=3)
    """For ICC and Bland-Altman."""
    paired_images: int = Field(2, ge=1)
    downstream_test_subjects: int = Field(2, ge=1)
    """That each fold tests; for diagnosis, of each clinical group."""
    memorisation_held_out_images: int = Field(20, ge=10)
    """Real images outside of training, from which the gate learns how near an image comes by chance."""
    membership_subjects: int = Field(4, ge=2)
    """In training and outside of it."""


class ExtractorSettings(Settings):
    """Networks on whose features images are compared. Nothing is downloaded; what is not given is not used."""

    weight_free: bool = True
    """A bank of fixed filters, whose distances are no FID."""
    inception: Path | None = None
    """Weights file of torch-fidelity's Inception (needs the extra `fidelity`); FID and KID are taken on it."""
    dinov2: Path | None = None
    """Folder of a DINOv2 in the layout of transformers."""
    clip: Path | None = None
    """Folder of a CLIP in the layout of transformers; CMMD is taken on it."""
    batch_size: int = free(32, ge=1)


class NetworkSettings(Settings):
    """The networks of the downstream tasks and how long they are trained: alike in every arm."""

    diagnosis: Literal["small", "resnet18", "resnet50", "swin", "mdf_mllm"] = "small"
    """All but the last begin with random weights."""
    mdf: DiagnoseSettings | None = None
    """Of mdf_mllm: its language model and U-Net. Its prompt is the same for all frames, and masks are not learnt."""
    unet_channels: tuple[int, ...] = Field((16, 32, 64, 128), min_length=2)
    """Each level halves the size."""
    size_px: int = Field(128, ge=32, le=1024)
    """Edge to which images are resized."""
    num_steps: int = Field(300, ge=1)
    """Optimizer steps of every arm: more images do not mean more training."""
    batch_size: int = Field(16, ge=2)
    lrs: tuple[float, ...] = Field((1e-3,), min_length=1)
    """Tried one by one; the one that is best on real validation images is tested."""
    validate_every_steps: int = Field(50, ge=1)
    """The step that is best on real validation images is tested."""

    @model_validator(mode="after")
    def _size_fits_the_networks(self) -> Self:
        parts = 2 ** (len(self.unet_channels) - 1)
        if self.size_px % parts:
            raise ValueError(f"size_px: {self.size_px} is no multiple of {parts}, as unet_channels needs it")
        if self.diagnosis == "swin" and self.size_px % 32:
            raise ValueError(f"size_px: {self.size_px} is no multiple of 32, as swin needs it")
        if (self.mdf is not None) != (self.diagnosis == "mdf_mllm"):
            raise ValueError(f"mdf: settings of mdf_mllm, and of nothing else (diagnosis: {self.diagnosis})")
        if self.mdf is not None:
            if self.size_px % UNET_FACTOR:
                raise ValueError(f"size_px: {self.size_px} is no multiple of {UNET_FACTOR}, as mdf_mllm needs it")
            self.mdf.refuse_size(self.size_px)
        if bad := [lr for lr in self.lrs if lr <= 0]:
            raise ValueError(f"lrs: {bad[0]} is no learning rate, expected a number above 0")
        return self

    @model_serializer(mode="wrap")
    def _without_mdf_where_there_is_none(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written as before there was one, and so with the same digest."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name != "mdf" or value is not None}


class FoldSets(Settings):
    """The sets of one fold whose generators were trained for it: made with `ccmdist shards fold`."""

    real: Path
    """Its splits are those of the fold."""
    synthetic: dict[str, Path] = Field(default_factory=dict)
    """Drawn by generators that were trained on its train split."""


Task = Literal["diagnosis", "segmentation"]


class DownstreamSettings(Settings):
    """Do synthetic images help to diagnose and to segment: a grid of folds, seeds and arms, each trained and tested."""

    tasks: tuple[Task, ...] = Field(("diagnosis", "segmentation"), min_length=1)
    arms: tuple[str, ...] = (
        "real",
        "augmented",
        "phantom:1",
        "NAME:0.5",
        "NAME:1",
        "NAME:2",
        "NAME:5",
        "only NAME",
        "shuffled NAME:1",
    )
    """real; augmented: real ones with classical augmentation; NAME:R: real ones and R times as many of a synthetic set,
    where NAME stands for each of the synthetic sets, and phantom for fresh phantoms; only NAME: synthetic ones alone;
    shuffled NAME:R: synthetic ones whose labels (groups, or masks) were dealt out anew among them."""
    synthetic: dict[str, Path] = Field(default_factory=dict)
    """Sets to train on in place of those that are compared, by name: such as more images, drawn by the same generators
    from the masks of training subjects, which may be trained on but not released."""
    num_folds: int = Field(5, ge=2, le=20)
    """Over the subjects that no generator was trained on."""
    folds: tuple[FoldSets, ...] = ()
    """Instead, folds whose generators were trained for them."""
    num_seeds: int = Field(5, ge=1)
    networks: NetworkSettings = NetworkSettings()

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"tasks: {list(self.tasks)} must name each task at most once")
        if self.folds and self.synthetic:
            raise ValueError("synthetic: folds name their own sets; leave one of the two out")
        if len(self.folds) == 1:
            raise ValueError("folds: one fold is none, expected at least two")
        names = [sorted(fold.synthetic) for fold in self.folds]
        if other := [place for place, one in enumerate(names) if one != names[0]]:
            raise ValueError(f"folds.{other[0]}.synthetic: has {names[other[0]]}, folds.0 has {names[0]}")
        return self

    @property
    def pretrained_unet(self) -> Path | None:
        """Folder of the U-Net that diagnosis begins with, if it does not begin with random weights."""
        mdf = self.networks.mdf if "diagnosis" in self.tasks else None
        return mdf.unet if mdf else None

    def arms_with(self, compared: Iterable[str]) -> tuple[Arm, ...]:
        """The arms, NAME replaced by each synthetic set.

        Args:
            compared: Names of the sets that are compared; those of folds count instead where there are folds.

        Raises:
            ValueError: If an arm cannot be read or names no set.
        """
        names = self.folds[0].synthetic if self.folds else [*compared]
        return expanded(self.arms, names)

    def num_cells(self, compared: Iterable[str]) -> int:
        """Trainings of the whole grid, if no task and no arm of it has to be left out; argument as of arms_with."""
        num_folds = len(self.folds) or self.num_folds
        return len(self.tasks) * num_folds * self.num_seeds * len(self.arms_with(compared))

    @property
    def folders(self) -> list[Path]:
        """Of the sets that it alone reads."""
        return [*self.synthetic.values(), *(folder for fold in self.folds for folder in fold.synthetic.values())]


class MemorisationSettings(Settings):
    """The gate: is any image a copy of a training image."""

    false_alarm_rate: float = Field(0.01, gt=0, lt=0.5)
    """Share of independent images that come nearer to training than the threshold by chance; with few held-out
    subjects, one in their number plus one."""
    alpha: float = Field(0.001, gt=0, lt=0.5)
    """Of the test whether more images than that do, and of calling any independent image of a set a copy."""
    allow_training_masks: bool = False
    """Let images pass that were drawn from the nerve masks of training subjects, which are personal themselves. All
    frames are then compared without their nerves, as those agree by design."""


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
    extractors: ExtractorSettings = ExtractorSettings()
    downstream: DownstreamSettings | None = None
    """None: no downstream tasks."""
    memorisation: MemorisationSettings | None = MemorisationSettings()
    """None: no gate; the sets cannot be released then."""
    seed: int = Field(0, ge=0)

    @field_validator("synthetic", mode="before")
    @classmethod
    def _sets_have_plain_names(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            raise ValueError(f"is a mapping of names to folders; write synthetic.NAME={value}")
        for name in value if isinstance(value, dict) else ():
            if not re.fullmatch(SET_NAME, str(name)):
                raise ValueError(f"{name!r} is no name for a set, expected letters, digits, _ and -")
        return value

    @model_validator(mode="after")
    def _report_lies_beside_the_sets(self) -> Self:
        for name, folder in {
            "real": self.real,
            **{f"synthetic.{name}": one for name, one in self.synthetic.items()},
        }.items():
            if self.out.absolute() == folder.absolute():
                raise ValueError(f"out: {self.out} is the folder of {name}; the report needs one of its own")
        return self

    @model_validator(mode="after")
    def _margins_are_known_and_positive(self) -> Self:
        unknown = sorted(set(self.margins) - set(DEFAULT_MARGINS))
        if unknown:
            raise ValueError(f"margins: no biomarker named {unknown[0]!r}; known: {', '.join(DEFAULT_MARGINS)}")
        if bad := [name for name, margin in self.margins.items() if margin <= 0]:
            raise ValueError(f"margins.{bad[0]}: must be positive (got {self.margins[bad[0]]})")
        return self

    @model_validator(mode="after")
    def _downstream_arms_can_be_read(self) -> Self:
        if self.downstream is not None:
            if strange := sorted(set(self.downstream.synthetic) - set(self.synthetic)):
                known = ", ".join(self.synthetic)
                raise ValueError(f"downstream.synthetic: {strange[0]!r} is not among the compared sets: {known}")
            try:
                self.downstream.arms_with(self.synthetic)
            except ValueError as error:
                raise ValueError(f"downstream.{error}") from None
        return self

    @property
    def runs_networks(self) -> bool:
        """Whether any of its work is that of networks, which want a GPU."""
        given = self.extractors
        return self.downstream is not None or any((given.inception, given.dinov2, given.clip))
