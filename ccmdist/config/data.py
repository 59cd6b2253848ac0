"""Settings of the stages that make shards and fill the cache, and of the section by which later stages find both."""

from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ccmdist.config.settings import Settings, free

Split = Literal["train", "val", "test"]
Dtype = Literal["bf16", "fp32"]
Flip = Literal["hflip", "vflip", "rot180"]
MIRRORS: Final[frozenset[Flip]] = frozenset({"hflip", "vflip"})
"""Flips that show the other eye."""
Prompts = Literal["given", "next_group"]
HoleShape = Literal["rectangle", "stroke", "band", "quadrant", "everything"]
Structure = Literal["mask", "points", "mask_and_points"]
PX_PER_TOKEN: Final = 16
"""Of an edge of an image: the VAE divides edges by 8, and a token is a patch of 2 x 2 latents."""


class PhantomShardsConfig(Settings):
    """`ccmdist shards phantom`: procedural image, mask and prompt triples for each clinical group."""

    out: Path
    """Folder of the shard set, such as shards/phantom."""
    subjects_per_group: int = Field(6, ge=1, le=100_000)
    frames_per_subject: int = Field(2, ge=1, le=10_000)
    size_px: int = Field(384, ge=64, le=1024)
    """Edge of a square frame; 384 px at 400/384 um per px is the field of an HRT3-RCM."""
    val_fraction: float = Field(0.15, ge=0, lt=1)
    test_fraction: float = Field(0.15, ge=0, lt=1)
    samples_per_shard: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    with_points: bool = False
    """Add maps of what each phantom was built with: branch points and ends of nerves, and dendritic cells."""


class FolderShardsConfig(Settings):
    """`ccmdist shards folders`: pack a folder with images, masks and a table, as described in shards/README.md."""

    source: Path
    """Folder that holds the table; the table's paths are relative to it."""
    out: Path
    """Folder of the shard set, such as shards/ccm."""
    table: str = "table.csv"
    val_fraction: float = Field(0.15, ge=0, lt=1)
    test_fraction: float = Field(0.15, ge=0, lt=1)
    samples_per_shard: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    pseudonym_key_file: Path | None = None
    """File with a secret of at least 16 bytes that keys the subjects' pseudonyms; made beside `out` when absent."""
    allow_synthetic: bool = False
    """Accept images that carry the mark of synthetic images as if they were real."""


class FoldShardsConfig(Settings):
    """`ccmdist shards fold`: the samples of a set, split by subject anew for one fold of a cross-validation."""

    source: Path
    """Folder of a set of real frames or phantoms."""
    out: Path
    """Folder of the fold's set, such as shards/ccm-fold-0."""
    fold: int = Field(ge=0)
    """Counted from 0. Over all folds, every subject is tested once."""
    num_folds: int = Field(5, ge=2, le=20)
    samples_per_shard: int = Field(256, ge=1)
    seed: int = Field(0, ge=0)
    """Draws the subjects; the same in all folds."""

    @model_validator(mode="after")
    def _fold_is_one_of_them(self) -> Self:
        if self.fold >= self.num_folds:
            raise ValueError(f"fold: {self.fold} is not below num_folds {self.num_folds}; folds are counted from 0")
        return self


class HoleSettings(Settings):
    """Holes that are cut into images for a model to fill. A frame that brings a hole of its own keeps that one."""

    shapes: tuple[HoleShape, ...] = Field(("rectangle", "stroke", "band", "quadrant", "everything"), min_length=1)
    """Drawn equally often: rectangles, freehand strokes, bands like pressure lines, a quarter, the whole frame."""
    per_sample: int = Field(4, ge=1, le=64)
    """Holes of each sample, and of each flipped view of it, that are cached."""
    seed: int = Field(0, ge=0)


class DataSettings(Settings):
    """Which shards, seen by which encoders, at which size: the section that names one cache."""

    shards: Path
    """Folder of a shard set, with its manifest.json."""
    model: Path
    """Folder of a Qwen-Image-Edit checkpoint in diffusers layout."""
    cache: Path = Path("cache")
    """Folder of caches; each is a folder in it, named by its fingerprint."""
    image_size_px: int = Field(384, ge=32, le=2048, multiple_of=PX_PER_TOKEN)
    """Edge to which square frames and masks are resized before encoding."""
    dtype: Dtype = "bf16"
    """Of the encoders and of what is cached."""
    flips: tuple[Flip, ...] = ()
    """Views of each training sample that are cached beside the sample itself. hflip and vflip mirror it: their prompts
    name the other eye. rot180 turns it and keeps the eye."""
    prompts: Prompts = "given"
    """What a mask is encoded with: its own prompt or, as a control of synthesis, that of the next clinical group
    (Control, T1NoDPN, T1DPN, Control). What such images lack beside others is what the prompt contributes."""
    structure: Structure = "mask"
    """What stands for the nerves: their mask, a map of points (branch points, ends, dendritic cells), or both."""
    holes: HoleSettings | None = None
    """Cache each image with holes too, for a model that fills them (`objective.kind: dual`)."""
    stage_model: bool = free(False)
    """Copy the transformer to each node's own disk ($CCMDIST_NODE_TMP) once, and read it from there in training and
    synthesis: 41 GB, which the next start on the node finds again."""

    @model_serializer(mode="wrap")
    def _without_what_is_usual(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Written as before these settings existed, and so with the same digest, unless they are set."""
        values: dict[str, Any] = handler(self)
        return {name: value for name, value in values.items() if name not in USUAL or value != USUAL[name]}


USUAL: Final = {name: DataSettings.model_fields[name].default for name in ("prompts", "structure", "holes")}
"""Settings of data that were added later, and what they mean where they are not told."""


class PrecomputeConfig(Settings):
    """`ccmdist precompute`: encode masks and prompts once, and images to latents once."""

    data: DataSettings
    splits: tuple[Split, ...] = ("train", "val", "test")
    batch_size: int = free(8, ge=1)
    """Samples that the encoders see at once."""

    @model_validator(mode="after")
    def _splits_are_distinct(self) -> Self:
        if len(set(self.splits)) != len(self.splits) or not self.splits:
            raise ValueError(f"splits: {list(self.splits)} must name each split at most once and at least one")
        return self
