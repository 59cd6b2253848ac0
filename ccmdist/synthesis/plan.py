"""What is to be drawn: one request per image, in fixed batches; imports no torch.

The batch is the unit of work, and its members never change: worker i of n draws ``batches[i::n]``, whatever n is.
The plan's digest covers all that decides the bytes of an image, and every image carries it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ccmdist.commit import commit_json, digest_of
from ccmdist.config.data import Dtype, HoleSettings, Prompts, Split, Structure
from ccmdist.config.objectives import NetworkKind
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log
from ccmdist.data.cache_index import CacheEntry, find_cache, flips, indexes
from ccmdist.data.given_prompts import prompted_group
from ccmdist.data.manifest import MANIFEST, ShardEntry, read_manifest
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.data.writer import shards_in
from ccmdist.errors import OF_THE_MACHINE, ConfigError, ModelError, RunError, ShardError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_folder import NetworkAbout
from ccmdist.synthesis.requests import Batch, Request, batches_of

CONTENT_VERSION: Final = 2
"""Raised when the same plan gives other images: another sampler, another place of the noise, other members."""
PLAN: Final = "plan.json"
UNTUNED: Final = "untuned"
"""Stands for the digest of an adapter where there is none."""
NONE: Final = "none"
"""Stands for the digest of what a network from scratch does not have."""
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


LATER: Final = {
    "prompts": "given",
    "network_kind": None,
    "network_digest": None,
    "structure": "mask",
    "holes": None,
    "completion_digest": None,
    "eta": 0.0,
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


def base_of(config: SynthesizeConfig) -> Base | None:
    """How the base is held, if the settings or the plan of a begun set say so; None if the card is to decide.

    Raises:
        ShardError: If the plan there cannot be read.
    """
    if config.base != "auto":
        return config.base
    return read_plan(config.out).settings.base if (config.out / PLAN).exists() else None


def make_plan(
    config: SynthesizeConfig,
    model: ModelFolder,
    encoders: dict[str, Any],
    adapter_digest: str,
    base: Base,
    completion_digest: str | None = None,
) -> Plan:
    """The plan of a config; writes nothing and draws nothing.

    Args:
        config: Masks, number of images, settings of the sampler.
        model: The folder that ``config`` names.
        encoders: Its ``encoder_identity()``, which reads weights.
        adapter_digest: Of the adapter that will draw, or "untuned".
        base: How the base model will be held.
        completion_digest: Of the adapter that will fill holes, if that is another one.

    Raises:
        CacheError: If no cache fits, or shards are missing in it.
        ConfigError: If the split is empty, a key would become too long, or there are too many batches.
    """
    manifest = read_manifest(config.data.shards)
    folder, cache_digest = find_cache(config.data, manifest.digest, encoders)
    settings = _settings(
        config,
        source_set_digest=manifest.digest,
        cache_digest=cache_digest,
        base_digest=model.transformer_digest(),
        adapter_digest=adapter_digest,
        noise_schedule_digest=digest_of(model.noise_schedule()),
        base=base,
        completion_digest=completion_digest,
    )
    shards = manifest.of_split(config.split)
    return Plan(settings=settings, batches=batches_of(config, _entries(config, folder, shards)))


def make_network_plan(config: SynthesizeConfig, network: NetworkAbout) -> Plan:
    """The plan of a config for a network that was trained from scratch; writes nothing and draws nothing.

    A network that sees pixels needs no cache and no model folder.

    Raises:
        CacheError: If the network sees latents, and no cache fits, or shards are missing in it.
        ConfigError: If the split is empty, a key would become too long, there are too many batches, or noise is to be
            added anew by a network that has no place for it.
        ShardError: If the network sees pixels, and a tar is not the one that the manifest names.
        ModelError: If the network draws no images, or the model folder is of another kind than it needs.
    """
    _refuse_network(config, network)
    manifest, data = read_manifest(config.data.shards), config.data
    cache_digest = schedule_digest = NONE
    if network.settings.sees == "latents":
        model = ModelFolder.open(data.model, *network.settings.model_kinds)
        folder, cache_digest = find_cache(data, manifest.digest, model.encoder_identity())
        schedule_digest = digest_of(model.noise_schedule())
        entries = _entries(config, folder, manifest.of_split(config.split))
    else:
        entries = _refuse_none(config, list(ShardSamples(data, (config.split,)).entries(config.split)))
    settings = _settings(
        config,
        source_set_digest=manifest.digest,
        cache_digest=cache_digest,
        base_digest=network.facts.get("base_digest", NONE),
        adapter_digest=NONE,
        noise_schedule_digest=schedule_digest,
        base="fp32",
        network=network,
    )
    return Plan(settings=settings, batches=batches_of(config, entries))


def _refuse_network(config: SynthesizeConfig, network: NetworkAbout) -> None:
    if not network.settings.draws:
        raise ModelError(
            f"{config.network}: is a network of {network.kind}, which draws no images of masks",
            network.settings.serves,
        )
    if network.settings.adds_noise:
        return
    if config.eta:
        raise ConfigError(
            f"eta: {config.eta:g}, but a network of {network.kind} draws without noise of its own", "leave eta out"
        )
    if config.denoise_steps < 2 and network.settings.has_noise_levels:
        raise ConfigError("denoise_steps: 1 is too few for a flow", "use at least 2")


def _settings(
    config: SynthesizeConfig,
    *,
    source_set_digest: str,
    cache_digest: str,
    base_digest: str,
    adapter_digest: str,
    noise_schedule_digest: str,
    base: Base,
    completion_digest: str | None = None,
    network: NetworkAbout | None = None,
) -> PlanSettings:
    data, is_one_pass = config.data, network is not None and not network.settings.has_noise_levels
    return PlanSettings(
        source_set_digest=source_set_digest,
        cache_digest=cache_digest,
        base_digest=base_digest,
        adapter_digest=adapter_digest,
        noise_schedule_digest=noise_schedule_digest,
        base=base,
        split=config.split,
        image_size_px=data.image_size_px,
        dtype=data.dtype,
        prompts=data.prompts,
        images_per_mask=config.images_per_mask,
        batch_size=config.batch_size,
        batches_per_shard=config.batches_per_shard,
        denoise_steps=1 if is_one_pass else config.denoise_steps,
        guidance_scale=1.0 if is_one_pass else config.guidance_scale,
        compile_blocks=config.compile_blocks,
        seed=config.seed,
        network_kind=network.kind if network else None,
        network_digest=network.digest if network else None,
        structure=data.structure,
        holes=data.holes if config.completes else None,
        completion_digest=completion_digest,
        eta=config.eta,
    )


def expected_batches(config: SynthesizeConfig) -> int:
    """How many batches the plan will have if all prompts have one length in tokens; needs the shard manifest alone.

    Raises:
        ShardError: If there is no shard set.
    """
    num_views = 1 + len(flips(config.data)) if config.split == "train" else 1
    num_samples = sum(shard.num_samples for shard in read_manifest(config.data.shards).of_split(config.split))
    return -(-num_samples * num_views * config.images_per_mask // config.batch_size) * len(config.objectives)


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


def _entries(config: SynthesizeConfig, folder: Path, shards: Sequence[ShardEntry]) -> list[CacheEntry]:
    return _refuse_none(config, [entry for index in indexes(folder, shards, config.data) for entry in index.entries])


def _refuse_none(config: SynthesizeConfig, entries: list[CacheEntry]) -> list[CacheEntry]:
    if not entries:
        raise ConfigError(f"split: {config.data.shards} has no samples in {config.split}", "choose another split")
    if config.split == "train":
        log.warning("split=train: images of training subjects' masks; `ccmdist release` refuses them by default")
    return entries
