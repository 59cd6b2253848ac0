"""The checkpoints that are to be chosen from, what each of them draws, and what of it is done; imports no torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from ccmdist.cluster.run_directory import RunDirectory, committed_paths
from ccmdist.config.data import DataSettings
from ccmdist.config.loading import resolved, validate
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.select import SelectConfig
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.config.train import TrainConfig
from ccmdist.console import log
from ccmdist.data.cache_index import flips
from ccmdist.data.manifest import MANIFEST, SPLITS, Manifest, ShardEntry, read_manifest
from ccmdist.errors import ConfigError, EvaluationError
from ccmdist.synthesis.plan import PLAN, read_plan

if TYPE_CHECKING:
    from ccmdist.evaluation.measures import MeasureUnit

AS_DRAWN: Final = (
    "base",
    "images_per_mask",
    "batch_size",
    "batches_per_shard",
    "denoise_steps",
    "guidance_scale",
    "eta",
    "compile_blocks",
    "seed",
)
"""Settings that are handed on to synthesis."""


@dataclass(frozen=True)
class Candidates:
    """The checkpoints of a run and the masks that each of them draws.

    Attributes:
        config: What is drawn, and by which figure one is chosen.
        trained: Settings of the run.
        data: Masks, prompts and model.
        manifest: Of the masks.
        checkpoints: Folders, oldest first; at least one.
    """

    config: SelectConfig
    trained: TrainConfig
    data: DataSettings
    manifest: Manifest
    checkpoints: tuple[Path, ...]

    @property
    def weights(self) -> Literal["adapter", "network"]:
        """What the checkpoints hold, as the settings of synthesis call it."""
        return self.trained.objective.trains

    @property
    def num_images(self) -> int:
        """That each checkpoint draws."""
        num_views = 1 + len(flips(self.data)) if self.config.split == "train" else 1
        return sum(one.num_samples for one in self._shards) * num_views * self.config.images_per_mask

    @cached_property
    def num_subjects(self) -> int:
        """Whose masks those are."""
        return len(self.manifest.subjects_of(self.config.split))

    @property
    def _shards(self) -> tuple[ShardEntry, ...]:
        return self.manifest.of_split(self.config.split)

    def out(self, checkpoint: Path) -> Path:
        """Folder of the set that a checkpoint draws."""
        return self.config.folder / checkpoint.name

    def drawing(self, checkpoint: Path) -> SynthesizeConfig:
        """What a checkpoint draws; with the base held as in the sets that are begun.

        Raises:
            ConfigError: If the settings contradict those of the data.
        """
        values = {name: value for name, value in resolved(self.config).items() if name in AS_DRAWN}
        if self.config.base == "auto":
            # Else cards of two kinds would draw sets of two kinds, which cannot be compared.
            begun = {read_plan(out).settings.base for out in map(self.out, self.checkpoints) if (out / PLAN).exists()}
            values["base"] = next(iter(begun & {"bf16", "nf4"}), "auto") if len(begun) == 1 else "auto"
        values |= {"out": self.out(checkpoint), self.weights: checkpoint, "split": self.config.split}
        return validate(SynthesizeConfig, values | {"data": resolved(self.data)}, f"what {checkpoint} is to draw")

    def is_drawn(self, checkpoint: Path) -> bool:
        """Whether the set of a checkpoint is complete."""
        return (self.out(checkpoint) / MANIFEST).is_file()

    def is_measured(self, checkpoint: Path) -> bool:
        """Whether the set of a checkpoint is complete and measured."""
        return self.is_drawn(checkpoint) and all(unit.is_done() for unit in self.units(checkpoint))

    def units(self, checkpoint: Path | None) -> "list[MeasureUnit]":
        """Measuring the shards of a complete set, or of the real frames; each leaves one file."""
        from ccmdist.evaluation.measures import MeasureUnit, Measuring
        from ccmdist.evaluation.sets import ImageSet
        from ccmdist.evaluation.stored import MEASURES

        if checkpoint is None:
            images = ImageSet("real", self.data.shards, self.manifest, self.config.split)
        else:
            out = self.out(checkpoint)
            images = ImageSet(checkpoint.name, out, read_manifest(out), self.config.split)
        measuring = Measuring(self.config.folder / MEASURES, 2 * (self.data.image_size_px,))
        return [MeasureUnit(images, measuring, entry) for entry in images.shards]


def open_candidates(config: SelectConfig) -> Candidates:
    """The candidates of a run; reads settings and manifests alone.

    Raises:
        EvaluationError: If there is no training run or no checkpoint, the run has trained nothing that draws whole
            images, or nothing that adds noise where `eta` wants some, or the split has too few images or subjects.
        ShardError: If the masks are not there.
    """
    run = RunDirectory(config.run)
    trained = _trained(run)
    _refuse_fillers(trained)
    _refuse_misfit(config, trained)
    checkpoints = tuple(committed_paths(run.checkpoints))
    if not checkpoints:
        raise EvaluationError(
            f"run: {config.run} has no checkpoint yet", "let it train until it has saved one; see `ccmdist status`"
        )
    if config.split == "test":
        log.warning("split=test: what is reported of the chosen checkpoint on the test split will be too good")
    data = config.data or trained.data
    candidates = Candidates(config, trained, data, read_manifest(data.shards), checkpoints)
    _refuse_few(candidates)
    return candidates


def _trained(run: RunDirectory) -> TrainConfig:
    try:
        return validate(TrainConfig, run.settings(), str(run.config))
    except (OSError, ValueError, ConfigError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise EvaluationError(
            f"run: {run.path} is not the folder of a training run ({run.config.name}: {problem})",
            "name the `run` of `ccmdist train`, such as runs/tiny",
        ) from None


def _refuse_fillers(trained: TrainConfig) -> None:
    """Refuse a run that has no adapter for whole images, by which alone is chosen."""
    if isinstance(trained.objective, DualSettings) and "synthesis" not in trained.objective.adapters:
        raise EvaluationError(
            f"run: {trained.run} has trained completion alone, and a checkpoint is chosen by the whole images it draws",
            "draw with some of its checkpoints (`ccmdist synthesize ... objective=completion adapter=CHECKPOINT`) and "
            "compare the sets with `ccmdist evaluate`",
        )


def _refuse_misfit(config: SelectConfig, trained: TrainConfig) -> None:
    """Refuse a run that draws nothing, or not in the way that is wanted."""
    objective = trained.objective
    if not objective.draws:
        raise EvaluationError(
            f"run: {trained.run} has trained {objective.kind}, which draws no images of masks; a checkpoint is chosen "
            "by what it draws",
            objective.serves,
        )
    if config.eta and not objective.adds_noise:
        raise EvaluationError(
            f"eta: {config.eta:g}, but a run of {objective.kind} draws without noise of its own",
            "leave eta out",
        )


def _refuse_few(candidates: Candidates) -> None:
    config, folder = candidates.config, candidates.data.shards
    if not candidates.num_images:
        others = ", ".join(other for other in SPLITS if candidates.manifest.of_split(other))
        raise EvaluationError(f"split: {folder} has no samples in {config.split}", f"set split to one of: {others}")
    for name, found in (("images", candidates.num_images), ("subjects", candidates.num_subjects)):
        wanted = getattr(config, f"min_{name}")
        if found < wanted:
            raise EvaluationError(
                f"split: {config.split} of {folder} makes {found} {name}, at least {wanted} are needed to choose by",
                f"pack shards with a larger val_fraction, or lower min_{name} if a rough choice will do",
            )
