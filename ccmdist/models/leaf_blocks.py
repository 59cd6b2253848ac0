"""Blocks that ZeRO-3 gathers at once: hooks of every layer on the host, not the GPU, limit small batches."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def arguments_of(block_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of what the forward of a class of blocks takes, in order."""
    return tuple(inspect.signature(block_class.forward).parameters)[1:]


def positional(block_class: type[nn.Module], streams: tuple[str, ...]) -> type[nn.Module]:
    """The same class; hands its streams on by position and the rest by name, however it is called.

    DeepSpeed's hooks of leaf modules see no keywords: they need the streams, through which gradients come back, and
    put every other tensor that they see through a function of their own in each pass.

    Args:
        block_class: Of a diffusers transformer.
        streams: Names of its arguments through which gradients come back.
    """
    arguments = arguments_of(block_class)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(arguments, args, strict=False)) | kwargs
        return block_class.__call__(self, *[given.pop(name) for name in streams], **given)

    about = {"__call__": call, "__module__": __name__, "__doc__": block_class.__doc__}
    return type(f"Positional{block_class.__name__}", (block_class,), about)


def make_leaves(model: nn.Module, leaves: Mapping[str, type[nn.Module]]) -> None:
    """Let ZeRO-3 gather each block at once.

    Args:
        model: Its blocks change their class.
        leaves: Name of a list of blocks -> what :func:`positional` made of their class.
    """
    from deepspeed.utils import set_z3_leaf_modules

    for name, leaf in leaves.items():
        for block in getattr(model, name):
            block.__class__ = leaf
    present = [leaf for name, leaf in leaves.items() if len(getattr(model, name))]
    set_z3_leaf_modules(model, present)
