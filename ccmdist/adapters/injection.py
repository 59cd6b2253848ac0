"""Put adapters into a model, and know of them together: their parameters, their norms, how far they have moved."""

import re
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ccmdist.adapters.frozen import dense
from ccmdist.adapters.lora import LoRALinear
from ccmdist.adapters.wdlora import ROWS_AT_ONCE, NormClock, WDLoRALinear
from ccmdist.config.train import AdapterSettings, WDLoRASettings

ROWS_OF_SQUARES = 64
OF_TEXT = r"^text_|\.(add_[qkv]_proj|to_add_out|txt_mlp|ff_context)"
OF_MLP = r"\.feed_forward\.|_mlp\.|\.ff\.|\.ff_context\.|\.proj_mlp$|single_\w+\.\d+\.proj_out$|\.mlp\."
"""Names of linears in the blocks of all models; blocks of a single stream count as the image's."""
OF_LLM = "language_model."
KINDS = ("lora_A", "lora_B", "magnitude")


class RowSquares:
    """Collects ||W||^2 of the rows of some linears while their weights are read for the first and only time."""

    def __init__(self, names: Iterable[str]) -> None:
        """Collect for the linears called ``names``."""
        self._names = {f"{name}.weight": name for name in names}
        self._found: dict[str, dict[int, Tensor]] = {name: {} for name in self._names.values()}
        self._rows: dict[str, int] = {}

    def on_rows(self, tensor_name: str, first_row: int, rows: Tensor, num_rows: int) -> None:
        """Take note of some whole rows of a tensor.

        Args:
            tensor_name: Name in the checkpoint.
            first_row: Index of ``rows[0]``.
            rows: Whole rows, of any float dtype.
            num_rows: Rows of the whole tensor.
        """
        if (name := self._names.get(tensor_name)) is not None:
            dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
            self._rows[name] = num_rows
            # Few at a time: what is kept would else lie amid large holes, one for every weight.
            parts = [part.to(dtype).square().sum(1) for part in rows.detach().split(ROWS_OF_SQUARES)]
            self._found[name][first_row] = torch.cat(parts).cpu()

    def whole(self) -> dict[str, Tensor]:
        """Name of linear -> ||W||^2 of all its rows, on the CPU, when this process has read them all."""
        return {name: self._whole(name) for name in self._found}

    def reduce(self) -> dict[str, Tensor]:
        """The same when each of several ranks has read the rows that it keeps. Collective."""
        shared = dist.is_initialized() and dist.get_world_size() > 1
        if shared:
            known: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(known, self._rows)
            self._rows = {name: count for one in known for name, count in one.items()}
        squares = self.whole()
        return _summed(squares) if shared else squares

    def _whole(self, name: str) -> Tensor:
        """All rows of a linear, zero where this process has not read."""
        parts = self._found[name]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts.values()) else torch.float32
        whole = torch.zeros(self._rows[name], dtype=dtype)
        for first_row, part in parts.items():
            whole[first_row : first_row + len(part)] = part
        return whole


def _summed(squares: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum over all ranks, in one all-reduce; every row was read by one rank, so it is exact. Collective."""
    flat = torch.cat(list(squares.values()))
    if dist.get_backend() == "nccl":
        flat = flat.cuda()
    dist.all_reduce(flat)
    return dict(zip(squares, flat.cpu().split([len(values) for values in squares.values()]), strict=True))


def row_squares_of(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """||W||^2 per row of linears whose weights lie in this process."""
    squares = {}
    for name in names:
        weight = dense(model.get_submodule(name).weight).detach()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        squares[name] = torch.cat([rows.to(dtype).square().sum(1) for rows in weight.split(ROWS_AT_ONCE)])
    return squares


class AdaptedLinears:
    """All adapted linears of one model."""

    def __init__(self, modules: dict[str, nn.Module], clock: NormClock) -> None:
        """Keep ``modules``, name -> adapted linear, which share ``clock``."""
        self.modules, self._clock = modules, clock

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: full parameter name -> parameter."""
        found = ((name, kind) for name, module in self.modules.items() for kind in KINDS if hasattr(module, kind))
        return {f"{name}.{kind}": getattr(self.modules[name], kind) for name, kind in found}

    def advance(self) -> None:
        """Say that the parameters have changed; every norm is evaluated anew, once, when it is next needed."""
        self._clock.advance()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over trained tensors, name of linear -> kind -> values; not under ZeRO-3.

        Where they have fewer ranks than the linears, as a grown adapter has, the others add nothing.
        """
        for name, module in self.modules.items():
            for kind, values in tensors[name].items():
                parameter = getattr(module, kind)
                parameter.zero_()[tuple(slice(size) for size in values.shape)].copy_(values)
        self.advance()

    def movement(self) -> dict[str, float]:
        """How far magnitudes and directions had moved at the last forward, per group of layers.

        "magnitude/img_attn" is the mean of |m / ||W|| - 1|, "direction_rad/img_attn" the mean angle between the rows
        of W' and W. Empty for plain LoRA.
        """
        found: dict[str, list[Tensor]] = {}
        for name, module in self.modules.items():
            if isinstance(module, WDLoRALinear) and module.rows is not None:
                moved = module.rows.movement()
                found.setdefault(f"magnitude/{layer_group(name)}", []).append(moved.magnitude)
                found.setdefault(f"direction_rad/{layer_group(name)}", []).append(moved.angle)
        return {name: float(torch.stack(values).mean()) for name, values in sorted(found.items())}

    def has_frozen_magnitudes(self) -> bool:
        """Whether no magnitude of any layer had moved at the last forward; False for plain LoRA."""
        states = [m.rows for m in self.modules.values() if isinstance(m, WDLoRALinear) and m.rows is not None]
        return bool(states) and float(torch.stack([state.movement().share_of_rows for state in states]).max()) == 0


def inject(
    model: nn.Module, names: list[str], settings: AdapterSettings, row_squares: Mapping[str, Tensor], seed: int
) -> AdaptedLinears:
    """Replace the linears called ``names`` in ``model`` by adapted ones that own the same weights.

    Args:
        model: Frozen; under ZeRO-3 its weights may be partitioned.
        names: Of ``nn.Linear`` modules.
        settings: Kind, rank, scale.
        row_squares: From :class:`RowSquares` or :func:`row_squares_of`.
        seed: Of the initial A.
    """
    clock = NormClock()
    modules: dict[str, nn.Module] = {}
    for name in names:
        modules[name] = adapted_linear(model.get_submodule(name), settings, row_squares[name], clock, name, seed)
        model.set_submodule(name, modules[name])
    return AdaptedLinears(modules, clock)


def adapted_linear(
    base: nn.Module, settings: AdapterSettings, row_squares: Tensor, clock: NormClock, name: str, seed: int
) -> nn.Module:
    """A linear of the kind that the settings name, which owns the weights of ``base``.

    Args:
        base: An ``nn.Linear``.
        settings: Kind, rank, scale.
        row_squares: ||W||^2 of its rows.
        clock: Of the adapter.
        name: With ``seed`` it decides the initial A.
        seed: Of the run.
    """
    assert isinstance(base, nn.Linear), f"{name} is a {type(base).__name__}"
    if isinstance(settings, WDLoRASettings):
        return WDLoRALinear(base, settings.lora_rank, settings.scale, row_squares, clock, name, seed)
    return LoRALinear(base, settings.lora_rank, settings.scale, name, seed)


def layer_group(name: str) -> str:
    """To which group of layers a linear belongs when movement is told: "img_attn", "txt_mlp", "llm_mlp" and so on."""
    stream = "llm" if name.startswith(OF_LLM) else "txt" if re.search(OF_TEXT, name) else "img"
    return f"{stream}_{'mlp' if re.search(OF_MLP, name) else 'attn'}"
