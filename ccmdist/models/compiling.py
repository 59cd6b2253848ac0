"""The blocks of the MMDiT compiled for synthesis by TorchInductor: fewer passes over memory between matrix products."""

import os
import shutil
from typing import Final

import torch

from ccmdist.errors import ConfigError
from ccmdist.models.sampling import BlockPass, block_pass

COMPILERS: Final = ("gcc", "cc", "clang")
"""What Triton builds its launchers with, unless CC names another."""
CPP_COMPILERS: Final = ("g++", "clang++")
MAX_SHAPES: Final = 256
"""Graphs that are kept, one per batch size and pair of text lengths; beyond its limit dynamo compiles no more."""


def compiled_block_pass(device: torch.device) -> BlockPass:
    """:func:`ccmdist.models.sampling.block_pass`, compiled anew for every shape, at its first call.

    All blocks of a model share the graph, for they differ in their weights alone.

    Raises:
        ConfigError: If nothing is there to compile with.
    """
    if problem := _missing(device):
        raise ConfigError(f"compile_blocks: {problem}", "load a compiler's module, or set compile_blocks=false")
    torch._dynamo.config.recompile_limit = MAX_SHAPES
    return torch.compile(block_pass, dynamic=False)


def _missing(device: torch.device) -> str | None:
    """What is missing, in words."""
    is_gpu = device.type == "cuda"
    if is_gpu and not _has_triton():
        return "Triton is not installed, or does not know this GPU"
    variable, usual = ("CC", COMPILERS) if is_gpu else ("CXX", CPP_COMPILERS)
    candidates = [named] if (named := os.environ.get(variable)) else list(usual)
    if not any(map(shutil.which, candidates)):
        return f"there is no compiler on PATH, looked for {', '.join(candidates)}"
    return None


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()
