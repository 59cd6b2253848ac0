"""Drawing a synthetic set as one process of a machine or of a Slurm array, and checking one."""

from pathlib import Path
from typing import Final

from ccmdist.cluster.preemption import StopFlag
from ccmdist.cluster.ranks import ranks_from_environment, worker_from_environment
from ccmdist.cluster.run_directory import RunDirectory
from ccmdist.config.loading import read_resolved
from ccmdist.config.synthesize import SynthesizeConfig
from ccmdist.console import log
from ccmdist.jobs.adapter_names import refuse_what_was_not_trained
from ccmdist.models.network_folder import ABOUT_FILE, read_about
from ccmdist.synthesis.output import SyntheticSet
from ccmdist.synthesis.plan import PLAN, Plan, read_plan, refuse_other_set
from ccmdist.synthesis.planning import (
    UNTUNED,
    base_of,
    base_of_adapters,
    expected_batches,
    make_network_plan,
    make_plan,
)
from ccmdist.synthesis.verify import verify_against_plan

FORCED_EXIT_S = 3600.0
"""A batch is drawn to its end before a stop signal is obeyed; after this long without that, the process ends itself."""

AUTO: Final = "the form that the card of the first worker decides"


def run(config_path: str) -> None:
    """Draw this worker's batches.

    Raises:
        Preempted: If a stop signal came while there was work left.
    """
    config = read_resolved(SynthesizeConfig, Path(config_path))
    # Before anything heavy is imported or loaded: a signal that comes meanwhile is obeyed as one between two batches.
    with StopFlag(FORCED_EXIT_S) as stop:
        from ccmdist.cluster.device import take_device
        from ccmdist.jobs.adapter import find
        from ccmdist.jobs.network import find_network
        from ccmdist.synthesis.generate import synthesize

        take_device(ranks_from_environment())
        adapters = {name: find(config.adapter, name) for name in config.objectives} if config.adapter else None
        network = find_network(config.network) if config.network else None
        synthesize(config, network or adapters, *worker_from_environment(), should_stop=lambda: bool(stop))


def describe(config: SynthesizeConfig) -> str:
    """What the command would do: images, batches, and what is committed of them.

    Of the adapter only the settings of its run are read.

    Raises:
        CcmdistError: If model, shards or cache are not there or do not fit, the run of the adapter has trained
            something else, or the folder holds another set.
    """
    if config.network is not None:
        return _described_network(config, config.network)
    model = base_of_adapters(config)
    refuse_what_was_not_trained(config)
    digests: tuple[str, str | None] = (UNTUNED, None)
    if config.adapter is not None:
        # Taken as those that the set was begun with: to know them would need torch.
        begun = read_plan(config.out).settings if (config.out / PLAN).exists() else None
        digests = (begun.adapter_digest, begun.completion_digest) if begun else ("(not read)", None)
    base = base_of(config)
    # While the card has not decided yet, no set is begun either, and nothing that is told here depends on it.
    plan = make_plan(config, model, model.encoder_identity(), digests[0], base or "nf4", digests[1])
    refuse_other_set(config.out, plan)
    return (
        f"{_described_batches(config, plan)}\n{_described_holes(config)}"
        f"model: {model.title} at {config.data.model}, base in {base or AUTO}, "
        f"{_described_adapter(config)}, "
        f"{config.denoise_steps} denoise steps, guidance {config.guidance_scale:g}"
    )


def _described_adapter(config: SynthesizeConfig) -> str:
    if config.adapter is None or not config.completes:
        return f"adapter {config.adapter or 'none'}"
    return f"adapter{'s' * (len(config.objectives) - 1)} {' and '.join(config.objectives)} of {config.adapter}"


def _described_holes(config: SynthesizeConfig) -> str:
    """What becomes of frames that are not drawn whole; empty where all are."""
    if not config.completes:
        return ""
    assert config.data.holes is not None, "settings that fill holes say how they are cut"
    what = "half of the images fill holes" if config.objective == "both" else "all images fill holes"
    shapes = ", ".join(config.data.holes.shapes)
    return (
        f"{what} ({shapes}; {config.data.holes.per_sample} of each frame, or the one that a frame brings); outside of "
        "its hole an image keeps the bytes of its frame, so `ccmdist release` refuses the set\n"
    )


def _described_network(config: SynthesizeConfig, folder: Path) -> str:
    exported = folder if (folder / ABOUT_FILE).exists() else RunDirectory(folder).network
    if not (exported / ABOUT_FILE).exists():
        return f"{config.out}: images of {config.data.shards}, drawn by the network of a checkpoint in {folder}"
    about = read_about(exported)
    plan = make_network_plan(config, about)
    refuse_other_set(config.out, plan)
    steps = f"{config.denoise_steps} denoise steps, guidance {config.guidance_scale:g}"
    if config.eta:
        steps += f", eta {config.eta:g}"
    if not about.settings.has_noise_levels:
        steps = "one pass"
    return f"{_described_batches(config, plan)}\nmodel: {about.kind} from scratch at {exported}, {steps}"


def _described_batches(config: SynthesizeConfig, plan: Plan) -> str:
    return (
        f"{config.out}: {plan.num_images} images of {_num_masks(config, plan)} masks in "
        f"{len(plan.batches)} batches and {plan.num_shards} shards; "
        f"{SyntheticSet(config.out, plan).num_committed()} batches are committed"
    )


def _num_masks(config: SynthesizeConfig, plan: Plan) -> int:
    return plan.num_images // (config.images_per_mask * len(config.objectives))


def open_units(config: SynthesizeConfig) -> int:
    """Batches that are not committed yet: no more workers than that have something to do.

    A set that is not begun has as many as its masks make if all prompts have one length in tokens, so that it can be
    told before the cache is filled; each further length makes at most one more.

    Raises:
        CcmdistError: If the shards are not there, or the plan of the set cannot be read.
    """
    if not (config.out / PLAN).exists():
        return expected_batches(config)
    return len(SyntheticSet(config.out, read_plan(config.out)).open_batches())


def verify(folder: Path, source: Path | None = None) -> None:
    """Compare a synthetic set with its plan, and with the set it was drawn from; tell what was found to be right.

    Raises:
        ShardError: Naming samples that are missing, twice, foreign, or not as the plan asked for.
        RunError: If ``source`` is another set.
    """
    log.info("%s", verify_against_plan(folder, source))
