"""How large the checkpoints of a run will be, from the headers of the weight files alone."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ccmdist.config.train import TrainConfig, WDLoRASettings
from ccmdist.errors import ModelError
from ccmdist.models.model_folder import ModelFolder

BYTES_PER_VALUE: Final = 12
"""An fp32 value and two moments of the optimizer."""


def checkpoint_bytes(config: TrainConfig) -> int:
    """About what the kept checkpoints of a run, the one written, and its adapters take; 0 if unknown or a network."""
    if config.objective.trains != "adapter":
        return 0
    try:
        values = num_values(config)
    except (ModelError, OSError, ValueError, KeyError):
        return 0
    per_checkpoint = values * (BYTES_PER_VALUE + (4 if config.optim.ema_decay is not None else 0))
    return per_checkpoint * (config.checkpoint.keep + 1) + 4 * values


def num_values(config: TrainConfig) -> int:
    """About how many values are trained, at most where ranks grow: some of the last block are left out in truth."""
    rank = config.adapter.lora_rank
    magnitude = isinstance(config.adapter, WDLoRASettings)
    folder, targets = ModelFolder.open(config.data.model), config.adapter.targets
    shapes = [shape for name, shape in _shapes(folder) if any(folder.layout.selects(one, name) for one in targets)]
    of_each = sum(rank * (rows + columns) + magnitude * rows for rows, columns in shapes)
    return config.objective.num_adapters * of_each


def _shapes(folder: ModelFolder) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name in its block and shape of every matrix in the blocks of the transformer."""
    blocks = tuple(f"{name}." for name in folder.layout.blocks)
    files = set(folder.weight_files("transformer").values())
    for name, entry in (item for file in sorted(files) for item in _header(file).items()):
        shape = entry.get("shape", ())
        if name.startswith(blocks) and name.endswith(".weight") and len(shape) == 2:
            yield name.removesuffix(".weight").split(".", 2)[2], (shape[0], shape[1])


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return header
