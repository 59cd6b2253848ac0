"""Ranks that grow where the Fisher information says that one more would help: SeLoRA in one pass, with static shapes.

A layer's A (r_max, in) and B (out, r_max) are there whole from the start, and all of them is in every forward. Of its
ranks the first r are active. The other rows of A are as they were initialised, the other columns of B are zero, and
neither is trained, so a layer grows by counting one rank more: what it computes stays the same bit for bit.

The test of the paper widens a layer, A' = [A; K] with random K and B' = [B, 0], runs a second pass, and compares the
sums of squared gradients, which stand for the diagonal of the empirical Fisher information. With b the new column,

    dL/dA' = [dL/dA; s b^T (...)] = [dL/dA; 0],    dL/dB' = [dL/dB, dL/db],    all else as without them, for b = 0,

    ratio = (||dL/dA'||^2 + ||dL/dB'||^2) / (||dL/dA||^2 + ||dL/dB||^2)
          = 1 + ||dL/db||^2 / (||dL/dA||^2 + ||dL/dB||^2).

Row r of A is K, column r of B is b, the *probe*: the backward pass of every step has dL/db already. WDLoRA's norm is
constant in the backward pass, so all this holds of it too.

The ratio compares a layer with itself. Where it learns nothing and B stays near zero, a gradient of noise alone gives a
ratio of about 2 at rank 1; so a small threshold lets such layers grow too.

Source: Mao et al. 2024 (arXiv:2408.07196), Algorithm 1. The paper's page prints the inverse ratio; its released code
divides as here, and only so a ratio can exceed 1. Ours: one pass; sums over all steps since the last test instead of
one batch; the budget; the steps that each rank counts for itself, from the step at which it became active.

A checkpoint keeps, as ``manifest["objective_state"]["growth"]`` (read the active ranks with :func:`active_ranks`):
  births  {linear: [Adam step at which rank 0 became active, rank 1, ...]}, as many as are active
  sums    {linear: [||dL/db||^2, ||dL/dA||^2 + ||dL/dB||^2]}, added up since the last test
  tested  the same as it was at the last test
"""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ccmdist.config.train import GrowthSettings

NEVER: Final = 1 << 30
"""The birth of what is not active: after every step."""
PROBE: Final = NEVER - 1
"""The birth of the column of B whose gradient is looked at: not active either."""


@dataclass(frozen=True)
class Piece:
    """``count`` elements of a flattened parameter, from ``start``, as they lie in a flat tensor, from ``offset``.

    Attributes:
        offset: In the flat tensor.
        count: Elements.
        start: In the flattened parameter.
        shape: Of the whole parameter.
    """

    offset: int
    count: int
    start: int
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The piece."""
        return flat.narrow(0, self.offset, self.count)


class RankGrowth:
    """Which ranks of which layers are active, and when one more becomes so.

    Works on this process's pieces of parameters, wherever they are cut, and on sums over all processes: so every one
    of them decides alike, and what is kept does not depend on their number.
    """

    def __init__(self, linears: Iterable[str], lora_rank: int, settings: GrowthSettings) -> None:
        """Let every linear begin with its start rank.

        Args:
            linears: Names of the adapted linears.
            lora_rank: The largest that each may reach: rows of A, columns of B.
            settings: Start rank, threshold, interval, budget; the budget suffices for the start ranks.
        """
        self.births = {name: [0] * settings.start_rank for name in linears}
        self.lora_rank, self.settings = lora_rank, settings
        self._sums, self._tested = self._zeros(), self._zeros()

    @property
    def active(self) -> dict[str, int]:
        """Name of linear -> its active lora_rank."""
        return {name: len(steps) for name, steps in self.births.items()}

    def place(self, pieces: Mapping[str, Piece], flat: Tensor) -> None:
        """Say what the flat tensors hold that this process trains.

        Args:
            pieces: Name of parameter, LINEAR.KIND -> where it lies.
            flat: One of them, 1-D; what lies in no piece is padding.
        """
        self._pieces: dict[str, list[tuple[str, Piece]]] = {name: [] for name in self.births}
        for parameter, piece in pieces.items():
            linear, _, kind = parameter.rpartition(".")
            if piece.count:
                self._pieces[linear].append((kind, piece))
        found = [(name, kind, piece) for name, of in self._pieces.items() for kind, piece in of]
        self._trained = [(name, piece) for name, kind, piece in found if kind in ("lora_A", "lora_B")]
        self._probed = [(name, piece) for name, kind, piece in found if kind == "lora_B"]
        self.born = torch.full_like(flat, NEVER, dtype=torch.int32)
        self._fill(self.births)

    def look(self, gradient: Tensor) -> Tensor:
        """Measure a gradient, and set to zero what of it belongs to inactive ranks, so that nobody else counts it.

        Args:
            gradient: Flat, of the step that is about to be taken; changed in place.

        Returns:
            Squared norms of this process's pieces, for :meth:`add`; the host does not wait for them.
        """
        probe = torch.where(self.born == PROBE, gradient, 0)
        gradient.masked_fill_(self.born >= PROBE, 0)
        parts = [piece.of(probe) for _, piece in self._probed] + [piece.of(gradient) for _, piece in self._trained]
        return torch.stack(torch._foreach_norm(parts)).double().square() if parts else gradient.new_zeros(0)

    def add(self, squares: Tensor, total: Callable[[list[float]], list[float]]) -> None:
        """Add what :meth:`look` has found to the sums. Collective if ``total`` is.

        Args:
            squares: From :meth:`look`.
            total: Sums lists over all processes, element by element.
        """
        local, values = self._zeros(), iter(squares.tolist())
        for index, pieces in enumerate((self._probed, self._trained)):
            for name, _ in pieces:
                local[name][index] += next(values)
        found = iter(total([value for pair in local.values() for value in pair]))
        for pair in self._sums.values():
            pair[:] = [value + next(found) for value in pair]

    def grow(self, step: int) -> dict[str, float]:
        """Let layers grow by one rank if a test is due: name -> ratio of those that have, the largest ratio first.

        Args:
            step: How often the parameters have been updated.
        """
        if step % self.settings.every_steps:
            return {}
        self._tested, self._sums = self._sums, self._zeros()
        ratios, num_active = self.ratios(), sum(self.active.values())
        due = [name for name, ratio in ratios.items() if ratio >= self.settings.fisher_ratio]
        due.sort(key=lambda name: (-ratios[name], name))
        budget = self.settings.rank_budget
        chosen = due if budget is None else due[: max(budget - num_active, 0)]
        for name in chosen:
            self.births[name].append(step)
        self._fill(chosen)
        return {name: ratios[name] for name in chosen}

    def ratios(self) -> dict[str, float]:
        """Name -> ratio at the last test, of the linears that may still grow; 1 where there was no gradient."""
        growing = (name for name, rank in self.active.items() if rank < self.lora_rank)
        return {name: _ratio(*self._tested[name]) for name in growing}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as the head of this file describes it; the same on every process."""
        return copy.deepcopy({"births": self.births, "sums": self._sums, "tested": self._tested})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave for the same linears, after :meth:`place`."""
        assert state["births"].keys() == self.births.keys()
        # In the order of the model, which a file does not keep.
        self.births, self._sums, self._tested = (
            {name: list(state[what][name]) for name in self.births} for what in ("births", "sums", "tested")
        )
        self._fill(self.births)

    def _zeros(self) -> dict[str, list[float]]:
        return {name: [0.0, 0.0] for name in self.births}

    def _fill(self, linears: Iterable[str]) -> None:
        """Say of every element of some linears when it became active."""
        for name in linears:
            of_ranks = [*self.births[name], PROBE, *[NEVER] * self.lora_rank][: self.lora_rank]
            table = torch.tensor(of_ranks, dtype=torch.int32, device=self.born.device)
            for kind, piece in self._pieces[name]:
                if kind in ("lora_A", "lora_B"):
                    place = torch.arange(piece.start, piece.start + piece.count, device=self.born.device)
                    piece.of(self.born).copy_(
                        table[place // piece.shape[1] if kind == "lora_A" else place % piece.shape[1]]
                    )
                else:
                    piece.of(self.born).zero_()


def active_ranks(objective_state: Mapping[str, Any]) -> dict[str, int]:
    """Name of linear -> its active lora_rank, of what a checkpoint keeps; empty where ranks do not grow."""
    return {name: len(steps) for name, steps in objective_state.get("growth", {}).get("births", {}).items()}


def _ratio(probe: float, active: float) -> float:
    return 1 + probe / active if active else math.inf if probe else 1.0
