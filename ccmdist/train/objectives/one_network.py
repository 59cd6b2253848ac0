"""What objectives have in common that train every weight of one network, step by step."""

from typing import ClassVar

from torch import nn


class OneNetwork:
    """One parameter set: the network, which exists once the model is built."""

    set_name: ClassVar[str] = "network"
    network: nn.Module

    def parameter_sets(self) -> dict[str, dict[str, nn.Parameter]]:
        """One set: the network."""
        return {self.set_name: dict(self.network.named_parameters())}

    def sets_of_step(self, step: int) -> frozenset[str]:
        """Every step trains the network."""
        return frozenset({self.set_name})

    def after_step(self) -> None:
        """Nothing depends on the weights but what is computed with them."""
