"""Weights from safetensors files into a model, each process reading only what it keeps.

Under ZeRO-3 a rank fills its own partitions and reads no more than the rows that cover them: no rank ever holds
the whole model, and nothing is sent.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ccmdist.errors import ModelError
from ccmdist.models.stored_tensors import StoredTensors

OnRows = Callable[[str, int, Tensor, int], None]
"""Called with a tensor's name, the index of the first row given, whole rows as the model keeps them (flattened to
two dimensions), and the tensor's number of rows. Over all ranks of a partitioned model each row is given once."""

MAX_ELEMENTS_AT_ONCE: Final = 1 << 22
"""Read at a time: large for a file server, small beside what a rank keeps."""


@dataclass(frozen=True)
class Stretch:
    """The part of a flattened tensor that this process keeps: elements ``start`` to ``stop``, in ``target``."""

    target: Tensor
    start: int
    stop: int


@torch.no_grad()
def load_weights(
    model: torch.nn.Module,
    weight_files: dict[str, Path],
    on_rows: OnRows | None = None,
    prefix: str = "",
    stored_as: Mapping[str, str] | None = None,
) -> int:
    """Fill every parameter and persistent buffer of ``model``.

    Local: each rank reads its own part, whenever it likes.

    Args:
        model: Plain, or built under deepspeed.zero.Init.
        weight_files: Tensor name -> file, from ``ModelFolder.weight_files``; not empty. Those with the prefix are read.
        on_rows: Told the rows on the way, so that they need not be read again.
        prefix: How the names in the files begin, where ``model`` is a part of what they hold.
        stored_as: Tensor name -> another one that the file has for it.

    Returns:
        The number of bytes that were read.

    Raises:
        ModelError: If names or shapes do not fit the model.
    """
    check_names(model, weight_files, prefix)
    wanted = {prefix + name: tensor for name, tensor in _tensors(model).items()}
    names_of_file: dict[Path, list[str]] = {}
    for name, file in weight_files.items():
        if name in wanted:
            names_of_file.setdefault(file, []).append(name)
    num_bytes = 0
    for file, names in names_of_file.items():
        with StoredTensors(file) as stored:
            for name in names:
                shape, its_name = _shape(wanted[name]), (stored_as or {}).get(name, name)
                if (found := stored.shape(its_name)) != shape:
                    raise _misfit(file, f"{its_name} has shape {found}, expected {shape}", model)
                tell = None if on_rows is None else partial(on_rows, name)
                num_bytes += _fill(its_name, _kept(wanted[name]), stored, shape, tell)
    return num_bytes


def check_names(model: torch.nn.Module, weight_files: dict[str, Path], prefix: str = "") -> None:
    """Compare names alone, before anything is read; arguments and errors as of :func:`load_weights`."""
    wanted = {prefix + name for name in _tensors(model)}
    found = {name for name in weight_files if name.startswith(prefix)}
    if wanted != found:
        missing, unexpected = wanted - found, found - wanted
        what = f"missing {_listed(missing)}" if missing else f"unexpected {_listed(unexpected)}"
        raise _misfit(next(iter(weight_files.values())).parent, what, model)


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict(keep_vars=True).keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
    return dict(model.named_parameters()) | buffers


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def _kept(tensor: Tensor) -> Stretch:
    if (partition := getattr(tensor, "ds_tensor", None)) is None:
        return Stretch(tensor.data.view(-1), 0, tensor.numel())
    numel = torch.Size(_shape(tensor)).numel()
    # The last partitions are padded, or hold nothing at all.
    start = min(getattr(tensor, "ds_zero_partition_rank") * partition.ds_numel, numel)  # noqa: B009
    return Stretch(partition.data.view(-1), start, min(start + partition.ds_numel, numel))


def _fill(
    name: str,
    kept: Stretch,
    stored: StoredTensors,
    shape: tuple[int, ...],
    tell: Callable[[int, Tensor, int], None] | None,
) -> int:
    num_bytes, width = 0, torch.Size(shape[1:]).numel()
    for first, rows_as_stored in _rows(stored, name, kept, width):
        num_bytes += rows_as_stored.nbytes
        rows = rows_as_stored.to(kept.target.dtype)
        low, high = max(kept.start, first * width), min(kept.stop, (first + len(rows)) * width)
        stretch = rows.view(-1)[low - first * width : high - first * width]
        kept.target[low - kept.start : high - kept.start].copy_(stretch)
        # A row belongs to the rank that keeps its first element.
        owned, end = -(-low // width), -(-high // width)
        if tell is not None and owned < end:
            tell(owned, rows[owned - first : end - first], shape[0])
    return num_bytes


def _rows(stored: StoredTensors, name: str, kept: Stretch, width: int) -> Iterator[tuple[int, Tensor]]:
    """Whole rows that cover the stretch, a few at a time so that little memory is needed beside the target."""
    end = -(-kept.stop // width) if kept.start < kept.stop else 0
    rows_at_once = max(MAX_ELEMENTS_AT_ONCE // width, 1)
    for first in range(kept.start // width, end, rows_at_once):
        rows = stored.rows(name, first, min(first + rows_at_once, end))
        yield first, rows.reshape(len(rows), width)


def _misfit(place: Path, what: str, model: torch.nn.Module) -> ModelError:
    return ModelError(
        f"{place}: the weights do not fit {type(model).__name__}: {what}",
        "use config.json and weights of the same checkpoint",
    )


def _listed(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"
