"""WDLoRA: weight-decomposed low-rank adaptation in one module that owns W, its bias, A, B and the magnitude.

    W' = m (W + s B A) / ||W + s B A||        one norm per output row, constant in the backward pass

* ZeRO-3 gathers what a module owns directly, so the norm sees the whole W; base checkpoint keys stay unchanged.
* The norm needs neither W + s B A nor B A:
  ||W + s B A||^2 = ||W||^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B (A A^T)) * B), accumulated in fp32.
* W, A, B and m are constant between optimizer steps, so one evaluation per step is exact; a :class:`NormClock`
  says when it is due.
* The output is a residual of the base's output: bit for bit the base at the start, in bfloat16 too.

Shapes: x (..., in), W (out, in), A (r, in), B (out, r); T tokens, P some of them, O out, R lora_rank, I in, K some rows
of O.

Source: Liu et al. 2024 (arXiv:2402.09353), Eq. 5 and section 4.3; rows instead of the paper's columns, as all
implementations do. Zelenin and Zhuravlyova 2026 (arXiv:2603.22276) for the factored norm.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ccmdist.adapters.frozen import Dense, dense
from ccmdist.adapters.kept import kept

NORM_FLOOR = 1e-6
"""Smallest norm of a row: a row of zeros has no direction, and must give neither NaN nor a jump."""

SMALL_MAGNITUDE, SMALL_GAIN = 1e-3, 0.125
"""Of |m| and |m| / norm, below which dm is not read off the output: dividing by m would blow up rounding errors."""

ROWS_AT_ONCE, VALUES_IN_CACHE = 128, 1 << 18
"""Of a weight, and of activations, that are converted to fp32 at once: few enough for a core's cache."""

TOKENS_AT_ONCE, TOKENS_AT_ONCE_ON_CPU = 8192, 384
"""Of which the backward pass goes on to the next: enough for products of matrices to be as fast as of all at once."""


class NormClock:
    """Counts changes of the weights of one model; what was computed at an older count is out of date."""

    def __init__(self) -> None:
        self.count = 0

    def advance(self) -> None:
        """Say that A, B, m or W may have changed."""
        self.count += 1


class Movement(NamedTuple):
    """How far a layer has come from its base, means over its rows; scalars on the layer's device."""

    magnitude: Tensor
    """|m / ||W|| - 1|."""
    share_of_rows: Tensor
    """Share of rows whose magnitude has moved at all; 0 after some steps means it is frozen."""
    angle: Tensor
    """Angle between the rows of W + s B A and of W, in radians."""


class SmallRows:
    """Indices of a few rows, told to the host without making it wait for the device."""

    def __init__(self, is_small: Tensor) -> None:
        """Send ``is_small``, boolean of shape (out,), on its way."""
        self._is_small = is_small.to("cpu", non_blocking=True)
        self._copied = torch.cuda.current_stream(is_small.device).record_event() if is_small.is_cuda else None

    def indices(self) -> Tensor | None:
        """The indices, or None if there are none."""
        if self._copied is not None:
            self._copied.synchronize()
        found = self._is_small.nonzero().squeeze(1)
        return found if len(found) else None


@dataclass(frozen=True)
class RowState:
    """What a layer knows of its rows; every tensor has shape (out,) and is fp32 (fp64 for an fp64 base).

    Attributes:
        base_squares: ||W||^2.
        along: Product of the update s B A with W.
        update_squares: ||s B A||^2.
        magnitude: m.
        norm: ||W + s B A||, at least the floor.
        gain: m / norm.
        small: The rows whose magnitude is too small to divide by.
    """

    base_squares: Tensor
    along: Tensor
    update_squares: Tensor
    magnitude: Tensor
    norm: Tensor
    gain: Tensor
    small: SmallRows

    @classmethod
    @torch.no_grad()
    def evaluate(cls, W: Tensor, A: Tensor, B: Tensor, m: Tensor, base_squares: Tensor, scale: float) -> "RowState":
        """The state of a layer with these weights; ``m`` is copied, for ZeRO-3 takes it away again."""
        along = scale * (product_with_rows(W, A) * B).sum(1)
        update_squares = scale**2 * ((B @ (A @ A.T)) * B).sum(1)
        norm = root(base_squares + 2 * along + update_squares)
        small = SmallRows(m.abs() < (SMALL_GAIN * norm).clamp_min(SMALL_MAGNITUDE))
        return cls(base_squares, along, update_squares, m.clone(), norm, m / norm, small)

    def movement(self) -> Movement:
        """How far these rows have come from their base."""
        start = root(self.base_squares)
        relative = (self.magnitude / start - 1).abs()
        across = (self.update_squares - (self.along / start) ** 2).clamp_min(0).sqrt()
        angle = torch.atan2(across, (self.base_squares + self.along) / start)
        return Movement(relative.mean(), (relative > 0).to(relative.dtype).mean(), angle.mean())


class WDLoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank direction and a trainable magnitude per output row.

    At the start B = 0 and m = ||W||, so the layer equals its base bit for bit.
    """

    def __init__(
        self,
        base: nn.Linear,
        lora_rank: int,
        scale: float,
        row_squares: Tensor,
        clock: NormClock,
        name: str,
        seed: int,
    ) -> None:
        """Take over the base's parameters without looking at them: under ZeRO-3 they are not there yet.

        Args:
            base: The layer to adapt.
            lora_rank: Width of A and B.
            scale: s.
            row_squares: ||W||^2 of every row, fp32 (fp64 for an fp64 base), shape (out,).
            clock: Shared by the layers of one model.
            name: Of the layer in its model; with ``seed`` it decides A, on every rank alike.
            seed: Of the run.
        """
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.in_features, self.out_features = base.in_features, base.out_features
        self.scale, self.clock = scale, clock
        device, dtype = base.weight.device, adapter_dtype(base)
        self.lora_A = nn.Parameter(initial_down(lora_rank, base.in_features, name, seed).to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, lora_rank, device=device, dtype=dtype))
        self.register_buffer("row_squares", row_squares.to(device, dtype), persistent=False)
        self.magnitude = nn.Parameter(root(self.row_squares))
        self.rows: RowState | None = None
        self._count = -1

    def row_state(self) -> RowState:
        """Norms and gains of the rows, evaluated at most once per count of the clock."""
        if self.rows is None or self._count != self.clock.count:
            with torch.inference_mode(False):  # what validation evaluates, training may have to save for backward
                self.rows = RowState.evaluate(
                    dense(self.weight), self.lora_A, self.lora_B, self.magnitude, self.row_squares, self.scale
                )
            self._count = self.clock.count
        return self.rows

    def forward(self, x: Tensor) -> Tensor:
        """The product x W'^T + bias, in the dtype of ``x``."""
        rows = self.row_state()
        return _WDLoRA.apply(x, self.weight, self.bias, self.lora_A, self.lora_B, self.magnitude, rows, self.scale)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.in_features}, {self.out_features}, lora_rank={self.lora_A.shape[0]}, scale={self.scale:g}"


class _WDLoRA(torch.autograd.Function):
    """With g = m / norm: y = base + (g - 1) (base - b) + g s (x A^T) B^T = g base + g s (x A^T) B^T + (1 - g) b.

    At the start g is exactly 1 and all else exactly 0. g stays in fp32: in bfloat16 it would round to 1.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Dense,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        m: Tensor,
        rows: RowState,
        s: float,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        h_TR, y_TO = kept(lambda: _products(x_TI, dense(weight), b, A, B, rows, s))
        ctx.save_for_backward(x, b, A, B, h_TR, y_TO)
        ctx.weight, ctx.rows, ctx.s = weight, rows, s
        return y_TO.view(*x.shape[:-1], len(B))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, b, A, B, h_TR, y_TO = ctx.saved_tensors
        W = dense(ctx.weight)
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])
        needs_x, needs_A, needs_B, needs_m = (ctx.needs_input_grad[index] for index in (0, 3, 4, 5))
        dx_TI = torch.empty_like(x_TI) if needs_x else None
        dA, dB, dm = torch.zeros_like(A), torch.zeros_like(B), torch.zeros_like(ctx.rows.magnitude)
        for part in _parts(len(x_TI), TOKENS_AT_ONCE_ON_CPU if x.is_cpu else TOKENS_AT_ONCE):
            gdy_PO = _through_gain(dy_TO[part], y_TO[part], b, ctx.rows, dm if needs_m else None)
            t_PR = gdy_PO @ B.to(x.dtype)
            if needs_B:
                dB += gdy_PO.T @ h_TR[part]
            if dx_TI is not None:
                torch.mm(gdy_PO, W, out=dx_TI[part]).addmm_(t_PR, A.to(x.dtype), alpha=ctx.s)
            del gdy_PO
            if needs_A:
                dA += t_PR.T @ x_TI[part]
        dm /= ctx.rows.magnitude
        if needs_m and (k := ctx.rows.small.indices()) is not None:
            product_TK = torch.addmm(x_TI @ W[k].T, h_TR, B[k].to(x.dtype).T, alpha=ctx.s)
            dm[k] = (dy_TO[:, k] * product_TK).sum(0, dtype=dm.dtype) / ctx.rows.norm[k]
        dx = None if dx_TI is None else dx_TI.view_as(x)
        dA, dB = dA.mul_(ctx.s) if needs_A else None, dB.mul_(ctx.s) if needs_B else None
        return dx, None, None, dA, dB, dm if needs_m else None, None, None


def _products(
    x_TI: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, rows: RowState, s: float
) -> tuple[Tensor, Tensor]:
    """The narrow product x A^T, and the output."""
    h_TR = x_TI @ A.to(x_TI.dtype).T
    y_TO = F.linear(x_TI, W, b)
    bias = y_TO.new_zeros(()) if b is None else (1 - rows.gain) * b
    for part in _parts(len(y_TO), _num_cached(y_TO)):
        torch.addcmul(bias, y_TO[part], rows.gain, out=y_TO[part])  # in the dtype of the gain, rounded once
    y_TO.addmm_(h_TR, ((s * rows.gain)[:, None] * B).to(x_TI.dtype).T)
    return h_TR, y_TO


def _through_gain(dy_PO: Tensor, y_PO: Tensor, b: Tensor | None, rows: RowState, dm: Tensor | None) -> Tensor:
    """The product g dy; and adds to ``dm`` m times the gradient of m.

    That is the sum over tokens of dy m v, where m v = m (W + s B A) x / norm = y - b need not be saved.
    """
    gdy_PO = torch.empty_like(dy_PO)
    for part in _parts(len(dy_PO), _num_cached(dy_PO)):
        torch.mul(dy_PO[part], rows.gain, out=gdy_PO[part])
        if dm is not None:
            dm += (dy_PO[part] * y_PO[part]).sum(0, dtype=dm.dtype)
            if b is not None:
                dm -= b.to(dm.dtype) * dy_PO[part].sum(0, dtype=dm.dtype)
    return gdy_PO


def _num_cached(x_TO: Tensor) -> int:
    """Number of tokens that are few enough for what is computed of them to stay in a CPU's cache.

    On a CPU PyTorch copies operands of other dtypes as a whole; a GPU converts them on the way and takes all tokens.
    """
    return max(VALUES_IN_CACHE // x_TO.shape[1] if x_TO.is_cpu else len(x_TO), 1)


def _parts(num: int, num_at_once: int) -> Iterator[slice]:
    """Slices of ``num`` tokens."""
    return (slice(start, start + num_at_once) for start in range(0, num, num_at_once))


def root(squares: Tensor) -> Tensor:
    """Norms of rows from their squares, at least the floor."""
    return squares.clamp_min(NORM_FLOOR**2).sqrt()


def product_with_rows(W: Tensor, A: Tensor) -> Tensor:
    """W A^T in the precision of A, shape (out, r), without a copy of W in that precision."""
    if W.dtype == A.dtype:
        return W @ A.T
    if W.is_cuda:
        # A as the sum of two tensors of the dtype of W: one pass over W, products summed in fp32.
        high = A.to(W.dtype)
        halves = torch.cat([high, (A - high.to(A.dtype)).to(W.dtype)])
        return torch.mm(W, halves.T, out_dtype=A.dtype).unflatten(1, (2, -1)).sum(1)
    columns = A.T.contiguous()
    return torch.cat([rows.to(A.dtype) @ columns for rows in W.split(ROWS_AT_ONCE)])


def adapter_dtype(base: nn.Linear) -> torch.dtype:
    """Of what is trained beside a layer: fp64 beside fp64, else fp32. In bfloat16 a magnitude would never move."""
    return torch.float64 if base.weight.dtype == torch.float64 else torch.float32


def initial_down(lora_rank: int, in_features: int, name: str, seed: int) -> Tensor:
    """A, uniform in +-1/sqrt(in) (Kaiming uniform with a = sqrt 5, as LoRA), shape (r, in), fp32.

    Depends on the layer's name and the seed alone, so every rank of every world makes the same.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    source = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return (2 * torch.rand(lora_rank, in_features, generator=source) - 1) / math.sqrt(in_features)
