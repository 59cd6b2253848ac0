"""Several adapters with names on one frozen model, of which one at a time is in the forward.

Each linear that is adapted holds one layer for every adapter, and these share its weight and bias. All of them look at
one :class:`Switch`, so a change of adapter costs nothing and moves no weight. Each adapter has norms of its own, which
are evaluated anew when that adapter has changed and not when another one has.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ccmdist.adapters.injection import AdaptedLinears, adapted_linear
from ccmdist.adapters.wdlora import NormClock
from ccmdist.config.train import AdapterSettings


class Switch:
    """Which adapter is active in all linears of one model."""

    def __init__(self, active: str) -> None:
        self.active = active


class NamedLinear(nn.Module):
    """A frozen linear layer with several adapters; computes with the one that the switch names."""

    def __init__(self, adapters: Mapping[str, nn.Module], switch: Switch) -> None:
        """Hold ``adapters``, name -> adapted linear, which own the same weight and bias."""
        super().__init__()
        for name, adapted in adapters.items():
            self.add_module(name, adapted)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """What the active adapter makes of ``x``."""
        output: Tensor = self.get_submodule(self.switch.active)(x)
        return output


class NamedAdapters:
    """All adapters of one model.

    Attributes:
        of: Name of adapter -> its linears, called ``<linear>.<adapter>``.
    """

    def __init__(self, of: dict[str, AdaptedLinears], switch: Switch) -> None:
        """Keep the linears of each adapter, and the switch that they share."""
        self.of, self._switch = of, switch

    @property
    def active(self) -> str:
        """The adapter that the model computes with."""
        return self._switch.active

    def activate(self, name: str) -> None:
        """Let the model compute with the adapter called ``name``."""
        assert name in self.of, f"no adapter {name} among {', '.join(self.of)}"
        self._switch.active = name


def inject_named(
    model: nn.Module,
    names: Sequence[str],
    settings: AdapterSettings,
    row_squares: Mapping[str, Tensor],
    seed: int,
    adapters: Sequence[str],
) -> NamedAdapters:
    """Replace the linears called ``names`` in ``model`` by ones with several adapters; the first is active.

    Args:
        model: As :func:`ccmdist.adapters.injection.inject` takes it; so are ``names`` and ``row_squares``.
        names: Of the linears.
        settings: Kind, rank, scale: the same for all adapters.
        row_squares: ||W||^2 of the rows of each linear.
        seed: Of the initial A, which differs from adapter to adapter.
        adapters: Their names.
    """
    clocks, switch = {adapter: NormClock() for adapter in adapters}, Switch(adapters[0])
    found: dict[str, dict[str, nn.Module]] = {adapter: {} for adapter in adapters}
    for name in names:
        base, layers = model.get_submodule(name), {}
        for adapter, clock in clocks.items():
            of = f"{name}.{adapter}"
            layers[adapter] = adapted_linear(base, settings, row_squares[name], clock, of, seed)
            found[adapter][of] = layers[adapter]
        model.set_submodule(name, NamedLinear(layers, switch))
    return NamedAdapters({adapter: AdaptedLinears(found[adapter], clocks[adapter]) for adapter in adapters}, switch)
