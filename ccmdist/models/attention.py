"""Which attention kernel the MMDiT runs on: picked from what this process has, or named by the environment.

Nothing is ever padded here, so no kernel is given a mask, and the fast ones, which take none, are exact.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers.models import attention_dispatch
from torch.backends.cuda import SDPAParams, can_use_flash_attention

from ccmdist.console import log
from ccmdist.errors import ConfigError

VARIABLE: Final = "DIFFUSERS_ATTN_BACKEND"
"""diffusers' own environment variable that names a backend."""
FLASH: Final = "flash"
PYTORCH_FLASH: Final = "_native_flash"
NATIVE: Final = "native"
HALF: Final = (torch.bfloat16, torch.float16)
MAX_FLASH_HEAD_DIM: Final = 256


@dataclass(frozen=True)
class Facts:
    """What the choice depends on.

    Attributes:
        device: "cuda", "cpu".
        dtype: Of queries, keys and values.
        head_dim: Channels of an attention head.
        has_flash_attn: Whether diffusers can import flash-attn, finds it new enough, and the GPU is not too old for it.
        has_pytorch_flash: Whether PyTorch's own flash attention takes such queries on this device.
        named: The backend that the environment names, or "".
    """

    device: str
    dtype: torch.dtype
    head_dim: int
    has_flash_attn: bool
    has_pytorch_flash: bool
    named: str = ""


@dataclass(frozen=True)
class Backend:
    """A backend by diffusers' name, and why it was chosen."""

    name: str
    reason: str


def choose(facts: Facts) -> Backend:
    """The backend for ``facts``; pure.

    Raises:
        ConfigError: If the environment names a backend that is silently wrong for this model.
    """
    if "varlen" in facts.named:
        # diffusers #14139: it takes the first keys of a row, and the padding of [text, image] lies in the middle.
        raise ConfigError(
            f"{VARIABLE}={facts.named}: backends of variable lengths are silently wrong where text is padded before "
            "image tokens, and not needed: batches have one text length here",
            f"unset {VARIABLE}, or set it to {FLASH}, {PYTORCH_FLASH} or {NATIVE}",
        )
    if facts.named:
        return Backend(facts.named, f"{VARIABLE} names it")
    if facts.device != "cuda":
        return Backend(NATIVE, f"flash kernels need a GPU, this is {facts.device}")
    if facts.dtype not in HALF:
        return Backend(NATIVE, f"flash kernels need bf16 or fp16, this is {str(facts.dtype).removeprefix('torch.')}")
    if facts.has_flash_attn and facts.head_dim <= MAX_FLASH_HEAD_DIM:
        return Backend(FLASH, "flash-attn is installed")
    if facts.has_pytorch_flash:
        return Backend(PYTORCH_FLASH, "PyTorch's own flash attention; flash-attn is not installed, or too old")
    return Backend(NATIVE, f"no flash attention for heads of {facts.head_dim} channels on this GPU")


def set_backend(model: Any, device: torch.device, dtype: torch.dtype) -> Backend:
    """Let a model attend with the fastest backend that is exact here; says so in the log.

    Args:
        model: A transformer of diffusers.
        device: Where it computes.
        dtype: Of its activations.

    Raises:
        ConfigError: If the environment names a backend that is wrong here or cannot run.
    """
    backend = choose(_facts(model, device, dtype))
    try:
        with _quiet_diffusers():
            model.set_attention_backend(backend.name)
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(
            f"attention backend {backend.name} ({backend.reason}) cannot be used: {error}", f"unset {VARIABLE}"
        ) from None
    log.info("attention: %s (%s)", backend.name, backend.reason)
    return backend


def _facts(model: Any, device: torch.device, dtype: torch.dtype) -> Facts:
    head_dim = model.config.get("attention_head_dim") or sum(model.config.axes_dims)
    return Facts(
        device=device.type,
        dtype=dtype,
        head_dim=head_dim,
        has_flash_attn=attention_dispatch._CAN_USE_FLASH_ATTN and _is_new_enough(device),
        has_pytorch_flash=device.type == "cuda" and _takes_pytorch_flash(device, dtype, head_dim),
        named=os.environ.get(VARIABLE, ""),
    )


def _is_new_enough(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _takes_pytorch_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    query = torch.empty((1, 1, 64, head_dim), device=device, dtype=dtype, requires_grad=True)
    return can_use_flash_attention(SDPAParams(query, query, query, None, 0.0, False, False))


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without diffusers' warning that its backends are an experiment, which would stand in every log."""
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
