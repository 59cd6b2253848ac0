"""What lies between U-Net and language model in MDF-MLLM: tokens of levels, attention to them with a gate, and FiLM.

All of it computes in fp32, whatever the language model's states are.

Shape suffixes: B samples, L text tokens, N tokens of a level, D width, C channels, h w rows and columns of a level.

Source: arXiv:2509.21358 (scaled cross-attention, patch-wise projection, FiLM); gates that begin at zero after Alayrac
et al. 2022 (arXiv:2204.14198); FiLM after Perez et al. 2018 (arXiv:1709.07871). Positions and level vectors are ours.
"""

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LIGHT: Final = 110.0
"""Grey levels that are added to a frame where it is looked at most."""


class LevelTokens(nn.Module):
    """A level of the U-Net as grid x grid tokens: each patch projected, with its place and its level."""

    def __init__(self, channels: int, edge_px: int, grid: int, width: int) -> None:
        """For levels (B, channels, edge_px, edge_px)."""
        super().__init__()
        self.grid, self.patch_px, self.width = grid, edge_px // grid, width
        self.project = nn.Linear(channels * self.patch_px**2, width)
        self.level = nn.Parameter(torch.randn(width) * 0.02)

    def forward(self, level_BChw: Tensor) -> Tensor:
        """Tokens (B, N, D), row by row."""
        num, channels = level_BChw.shape[:2]
        parts = level_BChw.float().reshape(num, channels, self.grid, self.patch_px, self.grid, self.patch_px)
        patches = parts.permute(0, 2, 4, 1, 3, 5).reshape(num, self.grid**2, -1)
        tokens_BND: Tensor = self.project(patches) + self.level
        return tokens_BND + sine_positions(self.grid, self.width).to(tokens_BND)


class GatedCrossAttention(nn.Module):
    """Adds to states what they find in tokens, times tanh of a gate that is zero at first."""

    def __init__(self, width: int, heads: int) -> None:
        """For states and tokens of one width, which ``heads`` divides."""
        super().__init__()
        self.heads = heads
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, states_BLD: Tensor, tokens_BND: Tensor) -> tuple[Tensor, Tensor]:
        """The states with what was added, in their dtype; and how much each state attends to each token, (B, L, N).

        While the gate is zero they are the given states bit for bit.
        """
        x_BLD = self.norm(states_BLD.float())
        query, key, value = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, x in ((self.query, x_BLD), (self.key, tokens_BND), (self.value, tokens_BND))
        )
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        found_BLD = self.out((weights @ value).transpose(1, 2).flatten(2))
        fused_BLD = states_BLD.float() + self.gate.tanh() * found_BLD
        return fused_BLD.to(states_BLD.dtype), weights.mean(dim=1)


class Film(nn.Module):
    """Scales and shifts the channels of a level by a state; at first by one and zero."""

    def __init__(self, width: int, channels: int) -> None:
        """For states of ``width`` and levels of ``channels``."""
        super().__init__()
        self.project = nn.Linear(width, 2 * channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, level_BChw: Tensor, state_BD: Tensor) -> Tensor:
        """The level as the state wants it."""
        scale_BC, shift_BC = self.project(state_BD).chunk(2, dim=1)
        return level_BChw * (1 + scale_BC[..., None, None]) + shift_BC[..., None, None]


def sine_positions(grid: int, width: int) -> Tensor:
    """Sines and cosines of row and of column, (N, D); a quarter of the width each."""
    frequencies = torch.exp(torch.arange(width // 4) * (-math.log(100.0) / max(width // 4 - 1, 1)))
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(grid, dim=0), waves.repeat(grid, 1)
    return torch.cat([rows, columns], dim=1)


def overlay(frame_HW: Tensor, weight_N: Tensor) -> Tensor:
    """A frame, lit up where weights of square patches, given row by row, are large; uint8 (H, W)."""
    grid = math.isqrt(len(weight_N))
    relative = (weight_N / weight_N.max().clamp_min(1e-12)).view(1, 1, grid, grid)
    weight_HW = F.interpolate(relative, frame_HW.shape, mode="bilinear")[0, 0]
    return (0.75 * frame_HW + LIGHT * weight_HW).round().clamp(0, 255).to(torch.uint8)
