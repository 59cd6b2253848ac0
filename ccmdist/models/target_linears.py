"""Which linears of a transformer's blocks get an adapter."""

from collections.abc import Iterable, Mapping

from torch import nn

from ccmdist.errors import ConfigError

Groups = Mapping[str, tuple[str, ...]]
"""Names for groups of linears in a block, and how the linears of each begin."""


def chosen_linears(
    model: nn.Module, blocks: Iterable[str], targets: tuple[str, ...], groups: Groups, dead: Iterable[str]
) -> list[str]:
    """Names of the linears in the blocks that ``targets`` select, without those that never get a gradient.

    Args:
        model: With or without weights.
        blocks: Names of its lists of blocks.
        targets: Names of groups, or suffixes of names such as "attn.to_q".
        groups: Of this class of model.
        dead: Full names of linears that reach nothing which is read.

    Raises:
        ConfigError: If a target selects nothing.
    """
    linears = {
        f"{name}.{index}.{layer}": layer
        for name in blocks
        for index, block in enumerate(getattr(model, name))
        for layer, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    chosen: set[str] = set()
    for target in targets:
        found = {name for name, layer in linears.items() if _selects(target, layer, groups)}
        if not found:
            raise ConfigError(
                f"adapter.targets: '{target}' matches none of the {len(linears)} linear layers in the blocks of "
                f"{type(model).__name__}",
                f"use attn, mlp, or suffixes of {', '.join(dict.fromkeys(linears.values()))}",
            )
        chosen |= found
    left = chosen - set(dead)
    return [name for name in linears if name in left]


def _selects(target: str, layer: str, groups: Groups) -> bool:
    if target in groups:
        return layer.startswith(groups[target])
    return f".{layer}".endswith(f".{target}")
