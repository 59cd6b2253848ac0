"""Tables of modulation: made by a model's own layers, and kept in one file per node that its ranks share.

Shape suffixes: N noise levels of a table, B samples, R values of a row, D width of the model.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ccmdist.console import tracked
from ccmdist.models.checkpoint_io import load_weights
from ccmdist.models.mmdit import skeleton
from ccmdist.models.model_folder import ModelFolder


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
    model: nn.Module, name: str, dtype: torch.dtype, device: torch.device | str, files: dict[str, Any]
) -> nn.Module:
    """One layer of a model without weights, with its weights."""
    layer = nn.Module.to(model.get_submodule(name), dtype).to_empty(device=device)
    holder: nn.Module = layer
    for part in reversed(name.split(".")):
        holder = nn.ModuleDict({part: holder})
    load_weights(holder, {stored: file for stored, file in files.items() if stored.startswith(f"{name}.")})
    return layer
