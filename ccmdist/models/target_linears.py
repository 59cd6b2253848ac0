"""Which linears of a transformer's blocks get an adapter."""

from collections.abc import Iterable

from torch import nn

from ccmdist.errors import ConfigError
from ccmdist.models.layout import FolderLayout


def chosen_linears(model: nn.Module, layout: FolderLayout, targets: tuple[str, ...], dead: Iterable[str]) -> list[str]:
    """Names of the linears in the blocks that ``targets`` select, without those that never get a gradient.

    Args:
        model: With or without weights.
        layout: Of its folder: which lists of blocks it has, and what targets mean in them.
        targets: Names of groups, or suffixes of names such as "attn.to_q".
        dead: Full names of linears that reach nothing which is read.

    Raises:
        ConfigError: If a target selects nothing.
    """
    linears = {
        f"{name}.{index}.{layer}": layer
        for name in layout.blocks
        for index, block in enumerate(getattr(model, name))
        for layer, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    chosen: set[str] = set()
    for target in targets:
        found = {name for name, layer in linears.items() if layout.selects(target, layer)}
        if not found:
            raise ConfigError(
                f"adapter.targets: '{target}' matches none of the {len(linears)} linear layers in the blocks of "
                f"{type(model).__name__}",
                f"use attn, mlp, or suffixes of {', '.join(dict.fromkeys(linears.values()))}",
            )
        chosen |= found
    left = chosen - set(dead)
    return [name for name in linears if name in left]
