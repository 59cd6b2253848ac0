"""Tables of modulation: made by a model's own layers, and kept in one file per node that its ranks share.

The file is mapped into memory, so ranks share its pages, and only rows that a run uses are ever read. It is looked for
in the model folder first, where `ccmdist model convert` leaves one.

Shape suffixes: N noise levels of a table, B samples, R values of a row, D width of the model.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ccmdist.commit import committed_file, digest_of
from ccmdist.console import log, tracked
from ccmdist.errors import ConfigError
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.mmdit import skeleton
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable, levels, row_length
from ccmdist.models.node_folder import GIB, alone_on_node, make_room, node_folder
from ccmdist.models.stored_tensors import DTYPES

FORMAT_VERSION: Final = "1"
IN_MODEL: Final = "modulation"
"""Folder for tables in a model folder."""
NAMES: Final = "modulation-*.safetensors"
LEVELS_AT_ONCE: Final = 64
"""In which a table is made where its shape does not matter: each weight is then looked at a few times only."""
NAME_OF_DTYPE: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TableKind:
    """What two tables must have in common to be one; the noise levels may be more than are wanted.

    Attributes:
        base_digest: From ``ModelFolder.transformer_digest``.
        dtype: Of the model, as safetensors names it.
        samples_at_once: Batch size of the run: matrix products of another shape may round otherwise.
        made_with: Device and library, which may round otherwise too.
    """

    base_digest: str
    dtype: str
    samples_at_once: str
    made_with: str
    format_version: str = FORMAT_VERSION

    @classmethod
    def of(cls, base_digest: str, dtype: torch.dtype, samples_at_once: int, device: torch.device) -> "TableKind":
        """The kind that a run on ``device`` makes."""
        made_on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        return cls(base_digest, NAME_OF_DTYPE[dtype], str(samples_at_once), f"torch {torch.__version__}, {made_on}")

    def accepts(self, other: dict[str, str], is_given: bool) -> bool:
        """Whether a table with these metadata will do.

        Args:
            other: Of the file.
            is_given: It lies in the model folder, where somebody has put it. In bf16 it then need not come from the
                same device and shape, which change the last bit of a value now and then, if anything.
        """
        free = {"made_with"} | ({"samples_at_once"} if self.dtype == "BF16" else set()) if is_given else set()
        return all(other.get(name) == value for name, value in asdict(self).items() if name not in free)


def table_for(
    folder: ModelFolder,
    sigmas: Tensor,
    dtype: torch.dtype,
    samples_at_once: int,
    device: torch.device,
    base_digest: str,
) -> ModulationTable:
    """The table of a model for some noise levels: found, or made once for this node while its other ranks wait.

    Local: what ranks of a node have to agree on, they agree on by a lock.

    Args:
        folder: The model.
        sigmas: All noise levels that will be asked for.
        dtype: Of the model.
        samples_at_once: Samples of one forward.
        device: Of the run.
        base_digest: ``folder.transformer_digest()``, which reads much.

    Raises:
        ModelError: If the node's disk has no room, or its folder is not this user's alone.
    """
    if dtype == torch.bfloat16 and device.type == "cpu":
        samples_at_once = LEVELS_AT_ONCE  # any shape gives the same bits there (benchmarks/modulation_table.py)
    kind, levels_N = TableKind.of(base_digest, dtype, samples_at_once, device), levels(sigmas, dtype)
    if (table := _opened(folder.path / IN_MODEL, kind, levels_N, is_given=True)) is not None:
        return table
    place = node_folder()
    with alone_on_node(place, "modulation", "the table of modulation"):
        table = _opened(place, kind, levels_N)
        if table is None:
            num_bytes = len(levels_N) * row_length(skeleton(folder)) * dtype.itemsize
            remedy = "give a model folder from `ccmdist model convert`, or train with tabulate_modulation=false"
            make_room(place, num_bytes, "the table of modulation", remedy, NAMES)
            write_table(place, folder, levels_N, dtype, kind, device)
            table = _opened(place, kind, levels_N)
            assert table is not None, "it has just been written"
    return table


def write_table(
    place: Path, folder: ModelFolder, levels_N: Tensor, dtype: torch.dtype, kind: TableKind, device: torch.device
) -> Path:
    """Make a table and commit it to ``place``; its file.

    Raises:
        OSError: If the disk is full.
    """
    start, name = time.monotonic(), f"modulation-{digest_of([asdict(kind), levels_N.tolist()])[:16]}.safetensors"
    shape = len(levels_N), row_length(skeleton(folder))
    with committed_file(place / name) as temporary:
        rows_NR = _mapped_file(temporary, shape, dtype, levels_N, kind)
        tabulate(folder, levels_N, rows_NR, int(kind.samples_at_once), device)
        del rows_NR
    size, seconds = (place / name).stat().st_size / GIB, time.monotonic() - start
    log.info("%s: modulation at %d noise levels, %.2f GiB, made in %.1f s", place / name, len(levels_N), size, seconds)
    return place / name


def _mapped_file(file: Path, shape: tuple[int, int], dtype: torch.dtype, levels_N: Tensor, kind: TableKind) -> Tensor:
    """A safetensors file of a table whose rows are yet to be filled, by way of the tensor that is returned.

    Not by safetensors itself, which wants all of the rows in memory.
    """
    num_rows_bytes, levels_bytes = shape[0] * shape[1] * dtype.itemsize, levels_N.numpy().tobytes()
    entries = {
        "__metadata__": asdict(kind),
        "rows": {"dtype": kind.dtype, "shape": shape, "data_offsets": [0, num_rows_bytes]},
        "levels": {
            "dtype": "F32",
            "shape": [shape[0]],
            "data_offsets": [num_rows_bytes, num_rows_bytes + len(levels_bytes)],
        },
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 64 + 56)  # with the 8 bytes of its length, rows begin at a multiple of 64
    start = 8 + len(header)
    with file.open("r+b") as stream:
        # Blocks are taken now: a full disk would kill a process that writes to a map.
        os.posix_fallocate(stream.fileno(), 0, start + num_rows_bytes + len(levels_bytes))
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.seek(start + num_rows_bytes)
        stream.write(levels_bytes)
    mapped = torch.from_file(str(file), shared=True, size=start + num_rows_bytes, dtype=torch.uint8)
    return mapped[start:].view(dtype).view(shape)


def _opened(place: Path, kind: TableKind, levels_N: Tensor, is_given: bool = False) -> ModulationTable | None:
    """A table of a folder that has all rows that are wanted; None if there is none."""
    for file in sorted(place.glob(NAMES)):
        try:
            with safe_open(file, "pt") as stored:
                if not kind.accepts(stored.metadata() or {}, is_given):
                    continue
                table = ModulationTable(stored.get_tensor("levels"), stored.get_tensor("rows"), str(file))
            table.check(levels_N, "")
        except (SafetensorError, ConfigError):
            continue
        except OSError as error:
            # Whatever became of it, a table can be made anew.
            log.info("%s: is not used (%s)", file, error)
            continue
        log.info("%s: modulation at %d noise levels", file, len(table.levels_N))
        return table
    return None


@torch.no_grad()
def tabulate(
    folder: ModelFolder,
    levels_N: Tensor,
    rows_NR: Tensor,
    samples_at_once: int,
    device: torch.device | str = "cpu",
) -> None:
    """Fill the rows of a table by a model's own layers, of which one block's are in memory at a time.

    Args:
        folder: The model.
        levels_N: From :func:`levels`.
        rows_NR: What is filled; its dtype is that of the model. May be a memory map.
        samples_at_once: The batch size of the run: matrix products of another shape may round otherwise.
        device: Of the run, for the same reason.
    """
    model, dtype, files = skeleton(folder), rows_NR.dtype, folder.weight_files("transformer")
    width, is_doubled = model.inner_dim, model.zero_cond_t

    def loaded(layer: str) -> nn.Module:
        return _layer(model, layer, dtype, device, files)

    embed, nothing = loaded("time_text_embed"), torch.empty(0, dtype=dtype, device=device)
    embeddings = [
        (rows, count, embed(timestep_B, nothing))
        for rows, count, timestep_B in _chunks(levels_N.to(device, dtype), samples_at_once, is_doubled)
    ]
    for rows, count, embedding_BD in embeddings:
        rows_NR[rows, -width:] = embedding_BD[:count].to(rows_NR.device)
    num_blocks = len(model.transformer_blocks)
    for block in tracked(range(num_blocks), "blocks of modulation", num_blocks):
        start = 12 * width * block
        image, text = (loaded(f"transformer_blocks.{block}.{stream}") for stream in ("img_mod", "txt_mod"))
        for rows, count, embedding_BD in embeddings:
            rows_NR[rows, start : start + 6 * width] = image(embedding_BD)[:count].to(rows_NR.device)
            of_text_BD = embedding_BD.chunk(2)[0] if is_doubled else embedding_BD
            rows_NR[rows, start + 6 * width : start + 12 * width] = text(of_text_BD)[:count].to(rows_NR.device)


def _chunks(timestep_N: Tensor, size: int, is_doubled: bool) -> Iterator[tuple[slice, int, Tensor]]:
    """Rows, their number, and timesteps of always the same shape; as 2511 sees them, with as many zeros behind."""
    for first in range(0, len(timestep_N), size):
        chunk = timestep_N[first : first + size]
        timestep_B = torch.cat([chunk, chunk[-1:].expand(size - len(chunk))])
        doubled = torch.cat([timestep_B, timestep_B * 0]) if is_doubled else timestep_B
        yield slice(first, first + len(chunk)), len(chunk), doubled


def _layer(
    model: nn.Module, name: str, dtype: torch.dtype, device: torch.device | str, files: dict[str, Path]
) -> nn.Module:
    """One layer of a model without weights, with its weights."""
    layer = nn.Module.to(model.get_submodule(name), dtype).to_empty(device=device)
    load_weights(layer, files, prefix=f"{name}.")
    return layer
