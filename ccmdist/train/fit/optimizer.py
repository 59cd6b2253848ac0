"""Optimizer of the fits: orthogonalised momentum for matrices and kernels, AdamW for gains, biases and small layers.

On the tiny VAE plain Adam stays on a plateau for about 900 steps; this leaves it within 50. torch.optim.Muon takes
no kernels of convolutions, and iterates on the wide matrices instead of on their small Gram matrices.

Source: Jordan et al. 2024, Muon (kellerjordan.github.io/posts/muon): momentum, Newton-Schulz, and the coefficients.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS: Final = 5
MIN_MATRIX_SIZE: Final = 256
"""Smaller weights are left to AdamW."""
ADAM_FRACTION: Final = 0.1
"""Learning rate of AdamW relative to that of the matrices."""


class OrthogonalMomentum(torch.optim.Optimizer):
    """Steps along the orthogonalised momentum of every weight, a kernel being a matrix with a row per output."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        """Train ``weights``, each of two dimensions or more."""
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group["lr"], group["momentum"])

    def _update(self, weight: nn.Parameter, lr: float, momentum: float) -> None:
        buffer = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        buffer.mul_(momentum).add_(weight.grad)
        direction = orthogonalised((weight.grad + momentum * buffer).flatten(1))
        rows, columns = direction.shape
        weight.add_(direction.view_as(weight), alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalised(matrix: Tensor) -> Tensor:
    """About the nearest matrix with singular values near 1; what is exactly zero stays so."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-12)
    gram = wide @ wide.T
    product = identity = torch.eye(len(gram))
    for _ in range(NUM_ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        product, gram = polynomial @ product, polynomial @ gram @ polynomial
    wide = product @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class FitOptimizer:
    """Both optimizers of a model under one learning rate: linear warm-up, then a cosine to zero."""

    def __init__(self, model: nn.Module, lr: float, num_steps: int, warmup_steps: int = 50) -> None:
        """Train every parameter of ``model`` for ``num_steps`` steps."""
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.lr, self.num_steps, self.warmup_steps, self.step_index = lr, num_steps, warmup_steps, 0
        matrices = [p for p in self.parameters if _is_matrix(p)]
        others = [p for p in self.parameters if not _is_matrix(p)]
        self._matrices = OrthogonalMomentum(matrices, lr)
        self._others = torch.optim.AdamW(others, lr * ADAM_FRACTION, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, loss: Tensor) -> float:
        """One step down the gradient of ``loss``; its value."""
        for optimizer, fraction in ((self._matrices, 1.0), (self._others, ADAM_FRACTION)):
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = self._rate() * fraction
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._matrices.step()
        self._others.step()
        self.step_index += 1
        return float(loss.detach())

    def _rate(self) -> float:
        warm = min((self.step_index + 1) / self.warmup_steps, 1.0)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * self.step_index / self.num_steps))


def _is_matrix(parameter: nn.Parameter) -> bool:
    # A map to a few channels, such as grey, has no rows enough to make orthogonal.
    return parameter.dim() >= 2 and parameter.shape[0] >= 8 and parameter.numel() >= MIN_MATRIX_SIZE
