"""Make the plan of a config: what of its settings, and of the files that they name, decides the bytes of images.

Writes nothing and draws nothing; imports no torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from ccmdist.commit import digest_of
from ccmdist.config.objectives.msdm import NUM_NOISE_LEVELS
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log
from ccmdist.data.cache_index import CacheEntry, find_cache, flips, indexes
from ccmdist.data.manifest import ShardEntry, read_manifest
from ccmdist.data.shard_samples import ShardSamples
from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.network_folder import NetworkAbout
from ccmdist.synthesis.plan import NF4, PLAN, Base, Plan, PlanSettings, read_plan
from ccmdist.synthesis.requests import batches_of

UNTUNED: Final = "untuned"
"""Stands for the digest of an adapter where there is none."""
NONE: Final = "none"
"""Stands for the digest of what a network from scratch does not have."""


def base_of(config: SynthesizeConfig) -> Base | None:
    """How the base is held, if the settings or the plan of a begun set say so; None if the card is to decide.

    Raises:
        ShardError: If the plan there cannot be read.
    """
    if config.base != "auto":
        return config.base
    return read_plan(config.out).settings.base if (config.out / PLAN).exists() else None


def base_of_adapters(config: SynthesizeConfig) -> ModelFolder:
    """The model that draws where no network does.

    Raises:
        ConfigError: If it cannot draw as the settings say.
        ModelError: If it is not complete, or cannot draw by itself.
    """
    model = ModelFolder.open(config.data.model)
    if "transformer" not in model.components:
        raise ModelError(
            f"{config.data.model}: {model.title} draws with a network that was trained on it, and none is named",
            "add network=RUN/network, or set data.model to the folder of a model that adapters are trained for",
        )
    if config.completes and not model.layout.can_complete:
        raise ConfigError(
            f"objective: {config.objective} shows a model two condition images, {model.title} takes 1",
            "set data.model to a folder of Qwen-Image-Edit, or objective=synthesis",
        )
    unable = {
        f"base: {NF4}": config.base == NF4 and not model.layout.can_quantize,
        "compile_blocks:": config.compile_blocks and not model.layout.can_compile,
    }
    for what in (name for name, is_refused in unable.items() if is_refused):
        raise ConfigError(f"{what} is for Qwen-Image-Edit alone, {model.path} holds {model.title}", "leave it out")
    return model


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
    if config.guidance_scale > 1 and model.is_told_guidance:
        log.warning(
            "guidance_scale=%g: %s is told its guidance, and is now guided a second time by two passes per step; its "
            "stock pipeline draws as with guidance_scale=1",
            config.guidance_scale,
            model.title,
        )
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
        if config.denoise_steps > NUM_NOISE_LEVELS:
            raise ConfigError(
                f"denoise_steps: {config.denoise_steps} are more than the {NUM_NOISE_LEVELS} noise levels of a network "
                f"of {network.kind}",
                f"use 1 to {NUM_NOISE_LEVELS}",
            )
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
        sees_mask=network is None or network.settings.sees_mask,
    )


def expected_batches(config: SynthesizeConfig) -> int:
    """How many batches the plan will have if all prompts have one length in tokens; needs the shard manifest alone.

    Raises:
        ShardError: If there is no shard set.
    """
    num_views = 1 + len(flips(config.data)) if config.split == "train" else 1
    num_samples = sum(shard.num_samples for shard in read_manifest(config.data.shards).of_split(config.split))
    return -(-num_samples * num_views * config.images_per_mask // config.batch_size) * len(config.objectives)


def _entries(config: SynthesizeConfig, folder: Path, shards: Sequence[ShardEntry]) -> list[CacheEntry]:
    return _refuse_none(config, [entry for index in indexes(folder, shards, config.data) for entry in index.entries])


def _refuse_none(config: SynthesizeConfig, entries: list[CacheEntry]) -> list[CacheEntry]:
    if not entries:
        raise ConfigError(f"split: {config.data.shards} has no samples in {config.split}", "choose another split")
    if config.split == "train":
        log.warning("split=train: images of training subjects' masks; `ccmdist release` refuses them by default")
    return entries
