"""What is to be drawn, one request per image in fixed batches, and its file; imports no torch.

The batch is the unit of work, and its members never change: worker i of n draws ``batches[i::n]``, whatever n is.
The plan's digest covers all that decides the bytes of an image, and every image carries it.
"""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ccmdist.commit import commit_json, digest_of
from ccmdist.config.data import Dtype, HoleSettings, Prompts, Split, Structure
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.data.given_prompts import prompted_group
from ccmdist.data.manifest import MANIFEST
from ccmdist.data.writer import shards_in
from ccmdist.errors import OF_THE_MACHINE, RunError, ShardError
from ccmdist.synthesis.requests import Batch, Request

CONTENT_VERSION: Final = 2
"""Raised when the same plan gives other images: another sampler, another place of the noise, other members."""
PLAN: Final = "plan.json"
Base = Literal["bf16", "fp32", "nf4"]
"""How the base model is held: in the dtype of the run, or its blocks in 4 bits."""
NF4: Final = "nf4"


@dataclass(frozen=True)
class PlanSettings:
    """All that decides the bytes of the images, besides the list of requests."""

    source_set_digest: str
    """Of the manifest whose masks and prompts are used."""
    cache_digest: str
    """Of the cache's fingerprint: encoders, VAE, template, sizes."""
    base_digest: str
    """Of the MMDiT's config and weights."""
    adapter_digest: str
    """Of the adapter's settings and tensors, or "untuned"; of the one that draws whole images where there are two."""
    noise_schedule_digest: str
    base: Base
    split: Split
    image_size_px: int
    dtype: Dtype
    images_per_mask: int
    batch_size: int
    batches_per_shard: int
    denoise_steps: int
    guidance_scale: float
    seed: int
    compile_blocks: bool
    content_version: int = CONTENT_VERSION
    prompts: Prompts = "given"
    """next_group: a control, whose prompts are those of another clinical group than the masks."""
    network_kind: NetworkKind | None = None
    """Of a network that was trained from scratch and draws in place of the base and its adapter."""
    network_digest: str | None = None
    structure: Structure = "mask"
    """What stands for the nerves."""
    holes: HoleSettings | None = None
    """How holes are cut, where some are filled."""
    completion_digest: str | None = None
    """Of the adapter that fills holes, where it is not the one that draws whole images."""
    eta: float = 0.0
    """Noise that is added anew at each denoise step."""
    sees_mask: bool = True
    """Whether the images follow their masks, and not their prompts alone."""


LATER: Final = {
    field.name: field.default
    for field in fields(PlanSettings)
    if field.default is not MISSING and field.name != "content_version"
}
"""Settings that were added without another CONTENT_VERSION, and what they mean where they are not told."""


class Plan(BaseModel):
    """The images of a synthetic set, in the order in which its shards hold them."""

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    settings: PlanSettings
    batches: tuple[Batch, ...]

    @cached_property
    def digest(self) -> str:
        """Identity of the set: equal plans give equal images."""
        return digest_of(self.values())

    @property
    def num_images(self) -> int:
        """Of all batches."""
        return sum(len(batch.requests) for batch in self.batches)

    @property
    def num_shards(self) -> int:
        """Tars of the finished set."""
        return -(-len(self.batches) // self.settings.batches_per_shard)

    def batches_of_shard(self, shard: int) -> range:
        """Indices of the batches whose images one shard holds."""
        first = shard * self.settings.batches_per_shard
        return range(first, min(first + self.settings.batches_per_shard, len(self.batches)))

    def provenance(
        self, batch: int, request: Request, mask_sha256: str, inpaint_mask_sha256: str | None = None
    ) -> dict[str, Any]:
        """What a synthetic sample says of its origin: enough to draw it again.

        Args:
            batch: Its place in the plan.
            request: Of the sample.
            mask_sha256: Identity of its nerve mask.
            inpaint_mask_sha256: Identity of the hole that was filled, if one was.
        """
        settings, is_completion = self.settings, request.objective == "completion"
        about = {
            "source_key": request.source_key,
            "source_set_digest": settings.source_set_digest,
            "image_number": request.image_number,
            "mask_sha256": mask_sha256,
            "seed": settings.seed,
            "base_digest": settings.base_digest,
            "base": settings.base,
            "adapter_digest": (is_completion and settings.completion_digest) or settings.adapter_digest,
            "denoise_steps": settings.denoise_steps,
            "guidance_scale": settings.guidance_scale,
            "plan_digest": self.digest,
            "batch": batch,
        }
        if settings.prompts != "given":
            group = prompted_group(request.clinical_group, settings.prompts, f"sample {request.source_key}")
            about |= {"prompts": settings.prompts, "prompted_group": group}
        if settings.network_kind is not None:
            about |= {"network_kind": settings.network_kind, "network_digest": settings.network_digest}
        if settings.eta:
            about |= {"eta": settings.eta}
        if settings.structure != "mask":
            about |= {"structure": settings.structure}
        if is_completion:
            about |= {
                "objective": request.objective,
                "hole": request.hole,
                "inpaint_mask_sha256": inpaint_mask_sha256,
            }
        return about

    def summary(self) -> dict[str, Any]:
        """The settings, and one digest for all requests."""
        return self.settings_values() | {"requests": digest_of(self.values()["batches"])}

    def values(self) -> dict[str, Any]:
        """All of it, as JSON types."""
        return {"settings": self.settings_values(), "batches": [batch.values() for batch in self.batches]}

    def settings_values(self) -> dict[str, Any]:
        """The settings as JSON types; what a plan once did not know is told if it is set: others keep their digest."""
        values = asdict(self.settings)
        told = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
        if self.settings.holes is not None:
            told["holes"] = self.settings.holes.model_dump(mode="json")
        return told


def accept_plan(folder: Path, plan: Plan) -> None:
    """Write the plan of a new set, or check that the set in ``folder`` has this very plan.

    Raises:
        RunError: If the folder holds something else; nothing is changed then.
        ShardError: If the plan there cannot be read.
    """
    refuse_other_set(folder, plan)
    if not (folder / PLAN).exists():
        commit_json(folder / PLAN, {"digest": plan.digest, **plan.values()})
        # Another worker may have written the plan of another config over it.
        refuse_other_set(folder, plan)


def refuse_other_set(folder: Path, plan: Plan) -> None:
    """Check that ``folder`` is free for the plan, or holds a set with this very plan.

    Raises:
        RunError: If it holds a set with another plan, or shards that no synthesis has written.
        ShardError: If the plan there cannot be read.
    """
    path = folder / PLAN
    if path.exists():
        _refuse_differences(path, read_plan(folder).summary(), plan.summary())
    elif (folder / MANIFEST).exists() or shards_in(folder):
        raise RunError(f"{folder}: holds shards that were not drawn", "choose another out")


def read_plan(folder: Path) -> Plan:
    """The plan of the synthetic set in ``folder``.

    Raises:
        ShardError: If there is none, or it was changed after it was written.
    """
    path = folder / PLAN
    try:
        values = json.loads(path.read_bytes())
        digest = values.pop("digest")
        plan = Plan.model_validate(values)
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise ShardError(
            f"{path}: {error.strerror}", "name the folder of a set that `ccmdist synthesize` made"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        problem = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "is not a plan"
        raise ShardError(f"{path}: cannot be read ({problem})", "draw the set anew in another folder") from None
    if plan.digest != digest:
        raise ShardError(f"{path}: was changed after it was written", "draw the set anew in another folder")
    return plan


def _refuse_differences(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    if names:
        lines = "".join(f"\n  {name}: {_shown(before.get(name))} -> {_shown(now.get(name))}" for name in names)
        raise RunError(
            f"{path}: this set was begun with other settings:{lines}\nchoose another out, or restore the settings"
        )


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == hashlib.sha256().digest_size * 2 else text
