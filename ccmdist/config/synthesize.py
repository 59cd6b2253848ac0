"""Settings of synthesis: which masks, which adapter, how many images, in which fixed batches."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ccmdist.config.data import DataSettings, Split
from ccmdist.config.objectives.objective import AdapterName
from ccmdist.config.settings import Settings, free


class SynthesizeConfig(Settings):
    """`ccmdist synthesize`: one image or more for every mask of a shard set, written as shards."""

    out: Path
    """Folder of the synthetic shard set."""
    data: DataSettings
    """Its shards hold the masks and prompts, its cache their embeddings and latents."""
    split: Split = "test"
    adapter: Path | None = None
    """Folder of an exported adapter, or of a run, whose newest checkpoint is taken; or RUN/best.json, for the one that
    `ccmdist select` chose. Without one, the untuned model draws."""
    objective: Literal["synthesis", "completion", "both"] = "synthesis"
    """Draw whole images, fill the holes of images (data.holes, or those that frames bring with them), or both in one
    set: with the adapter of that name where a run of `dual` has trained two. Outside its hole an image keeps every
    byte."""
    network: Path | None = None
    """Folder of a network that was trained from scratch (RUN/network), or of its run or a checkpoint: draws instead."""
    base: Literal["auto", "bf16", "nf4"] = "auto"
    """How the base model is held: in bf16, or its blocks in 4 bits, which changes images a little. auto: in data.dtype
    where the card that begins the set can hold it, else nf4; the plan of the set keeps what was chosen."""
    images_per_mask: int = Field(1, ge=1, le=10_000)
    batch_size: int = Field(8, ge=1, le=1024)
    """Images of one text length that are sampled together: the unit of work. Part of what decides an image's bytes."""
    batches_per_shard: int = Field(16, ge=1)
    denoise_steps: int = Field(40, ge=1)
    """Of flows two or more: the noise schedule's terminal shift divides by zero in one. A SPADE network has none."""
    guidance_scale: float = Field(4.0, ge=1)
    """Of true classifier-free guidance; 1 means no second pass. A SPADE network has none."""
    eta: float = Field(0.0, ge=0, le=1)
    """Noise that an MSDM network adds anew at each denoise step: 0 none (DDIM), 1 as much as DDPM. Others have none."""
    compile_blocks: bool = False
    """Compile the blocks of the model, minutes at the start for each length of prompts, needs a compiler. Fused
    operations round otherwise: part of what decides an image's bytes."""
    seed: int = Field(0, ge=0)
    log_every_batches: int = free(1, ge=1)

    @model_validator(mode="after")
    def _base_is_in_the_dtype_of_the_run(self) -> Self:
        if self.base == "bf16" and self.data.dtype != "bf16":
            raise ValueError(f"base: bf16, but data.dtype is {self.data.dtype}; set base=auto, or data.dtype=bf16")
        return self

    @property
    def objectives(self) -> tuple[AdapterName, ...]:
        """What is drawn, each with the adapter of that name: whole images, filled holes, or the ones and the others."""
        return ("synthesis", "completion") if self.objective == "both" else (self.objective,)

    @property
    def completes(self) -> bool:
        """Whether holes are filled."""
        return "completion" in self.objectives

    @model_validator(mode="after")
    def _holes_are_cached(self) -> Self:
        if self.completes and self.data.holes is None:
            raise ValueError(f"data.holes: objective {self.objective} fills holes; set data.holes, for precompute too")
        return self

    @model_validator(mode="after")
    def _edit_model_follows_a_flow(self) -> Self:
        if self.network is not None:
            return self
        if self.eta:
            raise ValueError(f"eta: {self.eta:g}, but a frozen model draws without noise of its own; leave out")
        if self.denoise_steps < 2:
            raise ValueError("denoise_steps: 1, but a frozen model draws in two or more")
        return self

    @model_validator(mode="after")
    def _network_draws_alone(self) -> Self:
        given = {
            "adapter": self.adapter is not None,
            "base": self.base != "auto",
            "compile_blocks": self.compile_blocks,
        }
        if self.network is not None and self.completes:
            raise ValueError(
                "objective: network draws whole images only; fill holes with adapter=, of a run of objective dual"
            )
        if self.network is not None and any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{names}: network draws without a base model and its adapter; leave out one or the other")
        return self
