"""`ccmdist model plan`: a training run's needs before any of its GPU-hours is spent. Imports no torch."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console, RenderableType

from ccmdist.cluster.ranks import ranks_from_environment
from ccmdist.config.loading import load_for_slurm, parted
from ccmdist.config.slurm import SlurmSettings
from ccmdist.config.train import TrainConfig
from ccmdist.errors import CacheError, ConfigError, ShardError
from ccmdist.jobs.train import training_entries
from ccmdist.models.layout import REPOSITORIES, layout_named
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.template import Version
from ccmdist.planner.hardware import EFFICIENCY, Machine, fabric_named, gpu_named
from ccmdist.planner.plan import plan
from ccmdist.planner.scaling import scaling
from ccmdist.planner.table import page, scaling_page

WIDTH: Final = 100
DEFAULT_GPU: Final = "h100"


@dataclass(frozen=True)
class Asked:
    """What the command line says of the machine; None or as assumed where it says nothing."""

    gpus: int | None = None
    gpus_per_node: int | None = None
    gpu: str | None = None
    fabric: str | None = None
    time_limit_min: int | None = None
    efficiency: float = EFFICIENCY


@dataclass(frozen=True)
class Base:
    """The model that a run starts from, as far as a plan needs it."""

    transformer: dict[str, Any]
    version: Version
    num_text_tokens: int | None
    note: str


def show(arguments: Sequence[str], asked: dict[str, Any], as_json: bool, is_scaling: bool) -> None:
    """Print the plan of the run that the arguments describe.

    Args:
        arguments: YAML files and overrides of `ccmdist train`; a section `slurm` says what is asked of Slurm.
        asked: Fields of :class:`Asked`; None for those of which the command line says nothing.
        as_json: Print one JSON object.
        is_scaling: Print how the run scales, instead.

    Raises:
        CcmdistError: If the settings, the machine or the model folder cannot be used, or nothing fits.
    """
    config, slurm = load_for_slurm(TrainConfig, *parted(arguments))
    if config.objective.trains != "adapter":
        raise _unplanned(f"objective.kind: {config.objective.kind}")
    wish = Asked(**{name: value for name, value in asked.items() if value is not None})
    base = base_of(config)
    values, view = (_scaled if is_scaling else _planned)(config, slurm, wish, base)
    if as_json:
        sys.stdout.write(json.dumps(values | {"note": base.note}, indent=2) + "\n")
    else:
        _print(base.note, view)


def machine_of(config: TrainConfig, slurm: SlurmSettings, asked: Asked) -> Machine:
    """The machine: as the command line says, else as the section `slurm` asks for, else as this process finds it.

    Raises:
        ConfigError: If there is no such GPU or fabric, or the numbers do not fit.
    """
    gpu = asked.gpu or (slurm.gpu_type.lower() or DEFAULT_GPU)
    fabric = asked.fabric or ("nvlink-8x400g" if gpu_named(gpu).nvlink_bytes_per_s else "pcie-1x200g")
    num_gpus = asked.gpus or _num_gpus(config, slurm)
    of_node = slurm.num_gpus_per_node if _says_gpus(slurm) else min(num_gpus, fabric_named(fabric).gpus_per_node)
    return Machine(gpu, fabric, num_gpus, asked.gpus_per_node or min(of_node, num_gpus), asked.efficiency)


def base_of(config: TrainConfig) -> Base:
    """The model that a run starts from; the published one while its folder is not there yet.

    Raises:
        ConfigError: If it is a model that the planner does not know.
        ModelError: If the folder is there but not complete.
    """
    path = config.data.model
    if not path.exists():
        layout = layout_named(path)
        if not layout.is_planned:
            raise _unplanned(f"data.model: {layout.name}")
        named: list[Version] = [v for v, name in REPOSITORIES.items() if name.endswith(f"/{path.name}")]
        version = named[0] if named else "2509"
        note = f"{path} is not there yet: planned with the published Qwen-Image-Edit {version}, 60 blocks"
        return Base({"zero_cond_t": version == "2511"}, version, None, f"{note}; length of prompts assumed")
    model = ModelFolder.open(path)
    if not model.layout.is_planned:
        raise _unplanned(f"data.model: {model.title}")
    num_text = _num_text_tokens(config, model)
    known = (
        f"prompts of {num_text} tokens as cached" if num_text else "length of prompts assumed: there is no cache yet"
    )
    note = f"{path}: Qwen-Image-Edit {model.version}; {known}"
    return Base(model.config("transformer"), model.version, num_text, note)


def _unplanned(what: str) -> ConfigError:
    return ConfigError(
        f"{what} is not planned for, only adapters on Qwen-Image-Edit are",
        "start it for some steps: its log tells images/s, and TensorBoard memory",
    )


def _num_text_tokens(config: TrainConfig, model: ModelFolder) -> int | None:
    """Of the longest cached prompt; None without a cache."""
    try:
        entries = training_entries(config.data, model)
    except (CacheError, ShardError):
        return None
    return int(entries.num_text_tokens.max()) if len(entries) else None


def _num_gpus(config: TrainConfig, slurm: SlurmSettings) -> int:
    if _says_gpus(slurm) or slurm.nodes > 1:
        return slurm.nodes * slurm.num_gpus_per_node
    ranks = ranks_from_environment()
    return ranks.world_size if ranks is not None else config.processes


def _says_gpus(slurm: SlurmSettings) -> bool:
    """Whether somebody has asked Slurm for GPUs, or for one process for each."""
    return bool(slurm.model_fields_set & {"gpus_per_node", "tasks_per_node"}) and slurm.num_gpus_per_node > 0


def _planned(
    config: TrainConfig, slurm: SlurmSettings, asked: Asked, base: Base
) -> tuple[dict[str, Any], RenderableType]:
    machine = machine_of(config, slurm, asked)
    limit_s = 60 * (asked.time_limit_min or slurm.time_limit_min)
    found = plan(config, base.transformer, machine, base.version, base.num_text_tokens, limit_s, slurm.signal_lead_s)
    return found.as_json(), page(found)


def _scaled(
    config: TrainConfig, slurm: SlurmSettings, asked: Asked, base: Base
) -> tuple[dict[str, Any], RenderableType]:
    gpu = machine_of(config, slurm, asked).gpu
    rows = scaling(config, base.transformer, gpu, base.version, base.num_text_tokens, asked.efficiency)
    view = scaling_page(rows, gpu, config.micro_batch_size, asked.efficiency)
    return {"gpu": gpu, "efficiency": asked.efficiency, "rows": [dataclasses.asdict(row) for row in rows]}, view


def _print(note: str, view: RenderableType) -> None:
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.print(note, style="dim")
    console.print(view)
