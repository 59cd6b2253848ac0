"""What `ccmdist adapter show` prints of an adapter: kind, size, ranks, origin, and how far it has moved."""

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ccmdist.adapters.injection import layer_group
from ccmdist.adapters.model_card import told_ranks
from ccmdist.adapters.rank_map import RankMap
from ccmdist.adapters.state import AdapterState
from ccmdist.config.train import system_of
from ccmdist.console import log
from ccmdist.errors import AdapterError, ModelError
from ccmdist.jobs.adapter import find, movement, on_base, rows_of
from ccmdist.jobs.trained import run_of, settings_of
from ccmdist.models.model_folder import ModelFolder


def show(source: Path, name: str | None = None) -> None:
    """Print what an adapter adapts, how large it is, the ranks it has grown to, and how far it has moved.

    Args:
        source: Where it lies, as of :func:`ccmdist.jobs.adapter.find`.
        name: Which of two.

    Raises:
        CcmdistError: If there is none, or more than one and no name.
    """
    state = find(source, name)
    moved = json.loads(state.facts["movement"]) if "movement" in state.facts else _movement_in_run(source, state)
    table = Table("layers", "linears", "parameters", "magnitude moved", "direction moved")
    for group, linears in _by_group(state).items():
        parameters = sum(tensor.numel() for linear in linears for tensor in state.tensors[linear].values())
        magnitude, angle = moved.get(f"magnitude/{group}"), moved.get(f"direction_rad/{group}")
        told = "-" if magnitude is None else f"{magnitude:.2%}", "-" if angle is None else f"{angle:.4f} rad"
        table.add_row(group, str(len(linears)), f"{parameters:,}", *told)
    console = Console()
    console.print(f"{source}: {_title(state)}", highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    if state.settings.growth:
        console.print(_rank_table(state))
    facts = {fact: value for fact, value in sorted(state.facts.items()) if fact != "movement"}
    for fact, value in facts.items():
        console.print(f"{fact:{max(map(len, facts))}} {value}", highlight=False, markup=False, soft_wrap=True)
    if not moved and state.settings.kind == "wdlora":
        console.print("how far it has moved is known once it is exported, for that takes the base")


def _title(state: AdapterState) -> str:
    """Name, kind, rank and scale of an adapter in one line."""
    name, settings = state.facts.get("adapter_name"), state.settings
    scale = f"scale {state.scale:g}" if settings.growth else f"alpha {settings.alpha_of(settings.lora_rank):g}"
    ranks = told_ranks(state.lora_ranks.values())
    return f"{f'{name}, ' if name else ''}{system_of(settings)}, rank {ranks}, {scale}"


def _rank_table(state: AdapterState) -> Table:
    """The rank of every linear, blocks down and projections across: 60 blocks fit a terminal only so."""
    ranks = RankMap.of(dict(sorted(state.lora_ranks.items())))  # a file does not keep the order of the model
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("block", justify="right")
    for projection in ranks.projections:
        table.add_column(projection.replace(".", ".\n").replace("_", "\n_"), justify="right")
    for block, of_block in zip(ranks.blocks, ranks.ranks.T.tolist(), strict=True):
        table.add_row(str(block), *(str(rank) if rank else "-" for rank in of_block))
    table.add_row("in all", *map(str, ranks.ranks.sum(1).tolist()), style="bold")
    return table


def _movement_in_run(source: Path, state: AdapterState) -> dict[str, float]:
    """Movement on the base that the run was trained on; empty where that is not at hand."""
    run = run_of(source)
    if not run.config.is_file():
        return {}
    try:
        base = ModelFolder.open(settings_of(run).data.model)
        return movement(rows_of(on_base(state, base), base))
    except (ModelError, AdapterError) as error:
        log.warning("%s", error)
        return {}


def _by_group(state: AdapterState) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for linear in state.tensors:
        groups.setdefault(layer_group(linear), []).append(linear)
    return dict(sorted(groups.items()))
