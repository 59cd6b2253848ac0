"""The modulation layers of the MMDiT as a table over noise levels: a third of all weights, for one vector an image.

What `img_mod` and `txt_mod` of a block return depends on the noise level alone. For the levels that a run uses it is
tabulated once; then the model needs no modulation layers. In a tabled model the time embedding of a sample is its row
of the table, each block's modulation is a slice of the row, and the last norm gets the embedding at the row's end. So
nothing is global: whatever happens to the time embedding of a stock model, such as the doubled samples of 2511 or
recomputing a block in the backward pass, happens to the rows.

Rows are made by the layers themselves, in the shape that the run has: equal bit for bit to what they would return.

Shape suffixes: N noise levels of a table, B samples, R values of a row, S packed latent tokens, D width of the model.
"""

import re
from typing import Any, Final

import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn

from ccmdist.errors import ConfigError, ModelError

TABLED: Final = re.compile(r"(transformer_blocks\.\d+\.(img|txt)_mod|time_text_embed)\.")
"""How the names of weights begin that a tabled model does not have."""
MAX_DEVICE_BYTES: Final = 1 << 30
"""Tables up to this size lie on the device of the model; of larger ones only the rows of a batch go there."""
OFF_TABLE_REMEDY: Final = "use levels of the run's settings, or set tabulate_modulation=false"


def is_tabled(name: str) -> bool:
    """Whether a tabled model has no weight, or layer, of this name."""
    return TABLED.match(f"{name}.") is not None


def levels(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    """Noise levels as the keys of a table, ascending and each once, (N,): as a model in ``dtype`` sees them.

    Fewer than were given, for bf16 rounds neighbours to one value. 0 is among them: the time of clean images in 2511.
    """
    return torch.cat([sigmas.detach().cpu().to(dtype).float(), torch.zeros(1)]).unique(sorted=True)


def row_length(model: QwenImageTransformer2DModel) -> int:
    """R: twice six vectors for each block, and the time embedding."""
    return (12 * len(model.transformer_blocks) + 1) * model.inner_dim


class ModulationTable:
    """Rows by noise level.

    Args:
        levels_N: From :func:`levels`, on the CPU.
        rows_NR: In the dtype of the model, on the CPU; may be a memory map.
        about: What it is, for messages.
    """

    def __init__(self, levels_N: Tensor, rows_NR: Tensor, about: str = "the table of modulation") -> None:
        self.levels_N, self.rows_NR, self.about = levels_N, rows_NR, about
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Of the model that it is for."""
        return self.rows_NR.dtype

    def check(self, sigmas: Tensor, where: str) -> Tensor:
        """Refuse noise levels that have no row, such as before a run begins; which rows are theirs.

        Args:
            sigmas: Noise levels; 0 at the end, which no model is asked for, does not matter.
            where: The setting that wants them.

        Raises:
            ConfigError: If one has no row.
        """
        wanted = sigmas.detach().cpu().to(self.dtype).float()
        index, is_there = _found(self.levels_N, wanted)
        if not is_there.all():
            sigma, low, high = wanted[~is_there][0].item(), self.levels_N[0].item(), self.levels_N[-1].item()
            raise ConfigError(
                f"{where}: noise level {sigma:.6g} is not among the {len(self.levels_N)} of {self.about}, "
                f"which go from {low:.6g} to {high:.6g}",
                OFF_TABLE_REMEDY,
            )
        return index

    def rows(self, timestep_B: Tensor, device: torch.device) -> Tensor:
        """The rows of a batch on a device, (B, R).

        The device never waits for the host, unless a table too large for it is asked by timesteps that lie on it.

        Args:
            timestep_B: Noise levels. On the CPU one without a row is refused; on another device, where to look would
                be to wait, its row is NaN.
            device: Of the model.

        Raises:
            ConfigError: If a level has no row.
        """
        if self.rows_NR.nbytes <= MAX_DEVICE_BYTES and timestep_B.device == device and device.type != "cpu":
            return self._rows_there(timestep_B)
        index_B = self.check(timestep_B, "timestep")
        shape = len(index_B), self.rows_NR.shape[1]
        rows_BR = torch.empty(shape, dtype=self.dtype, pin_memory=device.type == "cuda")
        torch.index_select(self.rows_NR, 0, index_B, out=rows_BR)
        return rows_BR.to(device, non_blocking=True)

    def _rows_there(self, timestep_B: Tensor) -> Tensor:
        """The rows on the device of the timesteps, where the whole table stays from the first call on."""
        device = timestep_B.device
        if device not in self._on_device:
            self._on_device[device] = self.levels_N.to(device), self.rows_NR.to(device)
        levels_N, rows_NR = self._on_device[device]
        index_B, is_there_B = _found(levels_N, timestep_B.to(self.dtype).float())
        return rows_NR[index_B].masked_fill(~is_there_B[:, None], float("nan"))

    def only(self, levels_N: Tensor) -> "ModulationTable":
        """A table in memory of some of the levels alone.

        Args:
            levels_N: From :func:`levels`; all have a row.
        """
        index_N, _ = _found(self.levels_N, levels_N)
        return ModulationTable(levels_N, self.rows_NR[index_N], self.about)

    def install(self, model: QwenImageTransformer2DModel) -> None:
        """Put the table in place of the modulation layers of a model without weights.

        Raises:
            ModelError: If it was made for a model of another size.
        """
        if (expected := row_length(model)) != (found := self.rows_NR.shape[1]):
            raise ModelError(f"{self.about}: a row has {found} values, expected {expected}", "remove it")
        width = model.inner_dim
        for index, block in enumerate(model.transformer_blocks):
            start = 12 * width * index
            block.img_mod = RowSlice(start, start + 6 * width)
            block.txt_mod = RowSlice(start + 6 * width, start + 12 * width)
        model.norm_out.__class__ = NormOfRow
        model.time_text_embed = RowOfTime(self)
        model.register_forward_pre_hook(_rows_from_host, with_kwargs=True)


class RowSlice(nn.Module):
    """In place of a block's `img_mod` or `txt_mod`: its stretch of the row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, row_BR: Tensor) -> Tensor:
        """Shift, scale and gate of both norms, (B, 6 D)."""
        return row_BR[:, self.start : self.stop]


class NormOfRow(AdaLayerNormContinuous):
    """The last norm, which keeps its own layer: the time embedding lies at the row's end."""

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        """Normalise and modulate the image tokens, (B, S, D)."""
        embedding_BD = conditioning_embedding[:, -self.linear.in_features :]
        return super().forward(x, embedding_BD.contiguous())


class RowOfTime(nn.Module):
    """In place of the time embedding: the rows of the samples."""

    def __init__(self, table: ModulationTable) -> None:
        super().__init__()
        self.table = table

    def forward(self, timestep_B: Tensor, hidden_states: Tensor, rows_BR: Tensor | None = None) -> Tensor:
        """Rows, (B, R); those that the host has sent, if it has.

        In 2511 there are twice as many timesteps as samples: the second half, of the clean images, is 0.
        """
        if rows_BR is None:
            return self.table.rows(timestep_B, hidden_states.device)
        return rows_BR


def _rows_from_host(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """Where a model is asked by timesteps in host memory, look there, and send the rows instead.

    They go by the argument that diffusers hands on to the time embedding and uses for nothing else.
    """
    timestep_B, tokens = kwargs.get("timestep"), kwargs.get("hidden_states")
    if timestep_B is None or tokens is None or timestep_B.device.type != "cpu":
        return args, kwargs
    wanted = timestep_B.to(tokens.dtype)
    if getattr(model, "zero_cond_t", False):
        wanted = torch.cat([wanted, wanted * 0])
    table: ModulationTable = model.time_text_embed.table
    rows_BR = table.rows(wanted, tokens.device)
    sent = {"timestep": timestep_B.to(tokens.device, non_blocking=True), "additional_t_cond": rows_BR}
    return args, kwargs | sent


def _found(levels_N: Tensor, wanted_B: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each wanted level, and whether it is there."""
    index_B = torch.searchsorted(levels_N, wanted_B.contiguous()).clamp_max(len(levels_N) - 1)
    return index_B, levels_N[index_B] == wanted_B
