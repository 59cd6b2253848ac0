"""What `ccmdist adapter` does: find an adapter wherever it lies, export it, merge it, verify it."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ccmdist.adapters.comfyui import COMFYUI_FILE, write_comfyui
from ccmdist.adapters.growth import active_ranks
from ccmdist.adapters.injection import KINDS, layer_group
from ccmdist.adapters.merge import merged_rows, row_slices
from ccmdist.adapters.state import WEIGHTS_FILE, AdapterState, read_adapter, write_adapter
from ccmdist.adapters.wdlora import RowState
from ccmdist.commit import commit_bytes, committed_file, sync_folder, temporary_name
from ccmdist.config.objectives.adapters import DualSettings
from ccmdist.config.train import TrainConfig
from ccmdist.console import log, tracked
from ccmdist.errors import AdapterError, ModelError
from ccmdist.jobs.adapter_check import compare, linear_shapes
from ccmdist.jobs.adapter_names import NAMES, chosen_name, is_of_a_network
from ccmdist.jobs.trained import facts_of, find_trained, quantity_of
from ccmdist.models.model_folder import ModelFolder
from ccmdist.train.checkpoint import Checkpoint


def find(path: Path, name: str | None = None) -> AdapterState:
    """The adapter in a folder: an exported one, that of a run's newest checkpoint, or that of one checkpoint.

    Args:
        path: The folder; or the file RUN/best.json, for that of the checkpoint it points at.
        name: Which of two adapters of objective `dual`: "synthesis" or "completion". An adapter without a name is one
            that draws whole images, and so is "synthesis" too.

    Raises:
        AdapterError: If there is none, none of this name, or more than one and no name; or it cannot be read.
        CheckpointError: If the checkpoint asked for is broken, or the pointer points at none.
        ModelError: If the settings of the run are not known.
    """

    def exported(folder: Path) -> AdapterState | None:
        found = _exported(folder, name)
        return None if found is None else read_adapter(found)

    def of_checkpoint(checkpoint: Checkpoint, config: TrainConfig) -> AdapterState:
        return adapter_of(checkpoint, config, name)

    if (found := find_trained(path, "adapter", exported, of_checkpoint)) is not None:
        chosen_name([found.facts.get("adapter_name", "synthesis")], name, path)
        return found
    raise AdapterError(
        f"{path}: holds neither {WEIGHTS_FILE} nor a checkpoint that is whole",
        "give the folder of an exported adapter, of a run, or of a checkpoint (runs/NAME/checkpoints/step-00001000), "
        "or the file runs/NAME/best.json",
    )


def _exported(folder: Path, name: str | None) -> Path | None:
    """The exported adapter that a folder is, or that it holds under a name; None if it is or holds none."""
    if (folder / WEIGHTS_FILE).is_file():
        return folder
    there = [one for one in NAMES if (folder / one / WEIGHTS_FILE).is_file()]
    return folder / chosen_name(there, name, folder) if there else None


def adapter_of(checkpoint: Checkpoint, config: TrainConfig, name: str | None = None) -> AdapterState:
    """The adapter in a training checkpoint; its moving average where the run kept one.

    Args:
        checkpoint: Of the run.
        config: Settings of the run.
        name: As of :func:`find`.

    Raises:
        AdapterError: If the checkpoint does not hold the adapter that ``config`` and ``name`` describe.
    """
    if config.objective.trains != "adapter":
        raise is_of_a_network(checkpoint.path, config.objective)
    settings, facts = config.objective, _facts(checkpoint, config)
    suffix = ""
    if isinstance(settings, DualSettings):
        facts["adapter_name"] = chosen_name(settings.adapters, name, checkpoint.path)
        suffix = f".{facts['adapter_name']}"
    tensors: dict[str, dict[str, Tensor]] = {}
    for parameter in checkpoint.manifest["parameters"]:
        owner, _, kind = parameter.rpartition(".")
        if kind not in KINDS:
            raise AdapterError(
                f"{checkpoint.path}: {parameter} is not a parameter of an adapter", "give another checkpoint"
            )
        if owner.endswith(suffix):
            values = checkpoint.whole(parameter, quantity_of(checkpoint))
            tensors.setdefault(owner.removesuffix(suffix), {})[kind] = values
    if config.adapter.growth:
        tensors = _grown(tensors, active_ranks(checkpoint.objective_state), checkpoint.path)
    state = AdapterState(config.adapter, tensors, facts)
    state.check(checkpoint.path)
    return state


def _grown(
    tensors: Mapping[str, Mapping[str, Tensor]], lora_ranks: Mapping[str, int], where: Path
) -> dict[str, dict[str, Tensor]]:
    """The tensors without the ranks that have not become active: those add nothing, and were not trained."""
    if different := sorted(tensors.keys() ^ lora_ranks.keys()):
        raise AdapterError(f"{where}: does not tell the active ranks of {different[0]}", "give another checkpoint")
    found = {}
    for name, of in tensors.items():
        rank, B = lora_ranks[name], of["lora_B"]
        if B[:, rank:].any():
            raise AdapterError(f"{where}: {name} has more than its {rank} active ranks", "give another checkpoint")
        found[name] = {**of, "lora_A": of["lora_A"][:rank], "lora_B": B[:, :rank].contiguous()}
    return found


def export(source: Path, model: Path, out: Path, name: str | None = None) -> None:
    """Write an adapter for diffusers, PEFT and ComfyUI; it appears in ``out`` once stock diffusers has agreed with us.

    Raises:
        AdapterError: If it belongs to another base, does not load without loss, or ``out`` is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out}: already exists", "choose another folder")
    folder = ModelFolder.open(model)
    state = on_base(find(source, name), folder)
    rows = rows_of(state, folder)
    state = replace(state, facts={**state.facts, **_base_facts(folder), "movement": json.dumps(movement(rows))})
    temporary = temporary_name(out)
    try:
        write_adapter(temporary, state)
        if folder.layout.has_comfyui_names:
            write_comfyui(temporary, state, rows)
        log.info("%s", compare(folder, temporary))
        temporary.replace(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    is_told = folder.layout.has_comfyui_names
    also = f"and {COMFYUI_FILE}" if is_told else f"not for ComfyUI, whose names for {folder.title} are not known here"
    log.info("%s: adapter for diffusers and PEFT, %s", out, also)


def verify(source: Path, model: Path, name: str | None = None) -> None:
    """Load an adapter with stock diffusers and compare it with ours.

    Raises:
        AdapterError: If it belongs to another base, or anything differs.
    """
    folder = ModelFolder.open(model)
    state = on_base(find(source, name), folder)
    with tempfile.TemporaryDirectory(prefix="ccmdist-") as temporary:
        if (exported := _exported(source, name)) is None:
            exported = Path(temporary)
            write_adapter(exported, state)
        log.info("%s: %s", source, compare(folder, exported))


def merge(source: Path, model: Path, out: Path, name: str | None = None) -> None:
    """Write the base's transformer with the adapter merged: same files, names and dtypes, nothing else changed.

    Needs the memory of one tensor. When interrupted, the same command writes the folder anew.

    Raises:
        AdapterError: If the adapter belongs to another base, or ``out`` already holds a model.
    """
    if (out / "config.json").exists():
        raise AdapterError(f"{out}: already holds a model", "choose another folder")
    folder = ModelFolder.open(model)
    state = on_base(find(source, name), folder)
    files = folder.weight_files("transformer")
    names_of_file: dict[Path, list[str]] = {file: [] for file in files.values()}
    for name in state.tensors:
        names_of_file[files[f"{name}.weight"]].append(name)
    for file, names in tracked(names_of_file.items(), "weight files", len(names_of_file)):
        with committed_file(out / file.name) as temporary:
            shutil.copyfile(file, temporary)
            _merge_into_file(temporary, file, names, state)
    transformer = folder.path / "transformer"
    # The config last, for it makes the folder a model.
    for path in (*sorted(transformer.glob("*.index.json")), transformer / "config.json"):
        commit_bytes(out / path.name, path.read_bytes())
    log.info(
        "%s: load it with %s.from_pretrained, or put it in place of the base's",
        out,
        folder.config("transformer").get("_class_name"),
    )


def rows_of(state: AdapterState, folder: ModelFolder) -> dict[str, RowState]:
    """Name of linear -> what its rows are on the base, read weight by weight; empty for plain LoRA."""
    if state.settings.kind != "wdlora":
        return {}
    files, rows = folder.weight_files("transformer"), {}
    for name, tensors in tracked(state.tensors.items(), "linears", len(state.tensors)):
        with safe_open(files[f"{name}.weight"], "pt") as stored:
            W = stored.get_tensor(f"{name}.weight")
        squares = torch.cat([W[some].float().square().sum(1) for some in row_slices(len(W))])
        A, B, m = (tensors[kind] for kind in KINDS)
        rows[name] = RowState.evaluate(W, A, B, m, squares, state.scale)
    return rows


def movement(rows: Mapping[str, RowState]) -> dict[str, float]:
    """Mean movement of magnitudes and directions per group of layers, named as in the training log."""
    found: dict[str, list[Tensor]] = {}
    for name, row_state in rows.items():
        moved = row_state.movement()
        found.setdefault(f"magnitude/{layer_group(name)}", []).append(moved.magnitude)
        found.setdefault(f"direction_rad/{layer_group(name)}", []).append(moved.angle)
    return {name: float(torch.stack(values).mean()) for name, values in sorted(found.items())}


def on_base(state: AdapterState, folder: ModelFolder) -> AdapterState:
    """The state, after a check that ``folder`` is what it was trained on.

    Raises:
        AdapterError: If it is not.
    """
    trained_on, found = state.facts.get("base_digest", ""), folder.transformer_digest()
    if trained_on != found:
        raise AdapterError(
            f"{folder.path}: its transformer is {found[:12]}, the adapter was trained on {trained_on[:12] or '?'}",
            "give the model folder of the training with --model",
        )
    state.check_fits(linear_shapes(folder), folder.path)
    return state


def _facts(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, str]:
    facts = facts_of(checkpoint, config)
    facts |= {"image_size_px": str(config.data.image_size_px), "base_in_training": config.base}
    try:
        return facts | _base_facts(ModelFolder.open(config.data.model))
    except ModelError:
        return facts | {"model_version": "unknown"}


def _base_facts(folder: ModelFolder) -> dict[str, str]:
    config = folder.config("transformer")
    is_published = all(config.get(name, value) == value for name, value in folder.layout.published.items())
    facts = {"model_version": folder.edit_version or folder.title, "pipeline": folder.pipeline}
    if folder.layout.licence:
        facts |= {"base_name": folder.title, "base_licence": folder.layout.licence}
    return facts | ({"base_model": folder.repository} if is_published and folder.repository else {})


def _merge_into_file(copy: Path, base: Path, names: list[str], state: AdapterState) -> None:
    """Overwrite the weights of some linears in a copy of a safetensors file, a few rows at a time."""
    with copy.open("r+b") as stream, safe_open(base, "pt") as stored:
        header_length = int.from_bytes(stream.read(8), "little")
        header: dict[str, Any] = json.loads(stream.read(header_length))
        for name in names:
            part = stored.get_slice(f"{name}.weight")
            stream.seek(8 + header_length + header[f"{name}.weight"]["data_offsets"][0])
            for rows in row_slices(part.get_shape()[0]):
                merged = merged_rows(part[rows], state.tensors[name], rows, state.scale)
                stream.write(merged.contiguous().view(torch.uint8).numpy().tobytes())
