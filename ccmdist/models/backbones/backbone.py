"""What the project has to know of a frozen model that an adapter is trained on: all that differs from one to another.

Latents of all are (B, 16, H/8, W/8), packed to tokens of 64; all predict noise - x.

Shape suffixes: B samples, S packed latent tokens of target or conditions, C channels, L text tokens, D text width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ccmdist.models.building import with_weights, without_weights
from ccmdist.models.checkpoint_io import OnRows
from ccmdist.models.leaf_blocks import make_leaves
from ccmdist.models.model_folder import ModelFolder
from ccmdist.models.modulation_table import ModulationTable
from ccmdist.models.target_linears import chosen_linears

PROBE_HW, NUM_PROBE_TEXT_TOKENS = (4, 4), 7
"""Of inputs on which models are compared."""
Text = Mapping[str, Tensor]
"""What encoders made of prompts, by the names that the cache has for it."""
Predictor = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Noisy latents (B, S, C) and noise levels (B,) -> a prediction for each text that it was made for."""


class Backbone(ABC):
    """A frozen transformer in a model folder.

    Args:
        folder: The folder.
    """

    transformer: ClassVar[type[nn.Module]]
    """Its class in diffusers."""
    text: ClassVar[tuple[str, ...]] = ("prompt_embeds",)
    """Names of cached tensors that stand for the prompt."""
    leaves: ClassVar[Mapping[str, type[nn.Module]]]
    """Name of a list of blocks -> their class as ZeRO-3 is to see it, see :func:`leaf_blocks.positional`."""
    guidance: ClassVar[Literal["rescaled", "plain"]] = "plain"
    """How predictions with the prompt and the negative prompt are put together, as the stock pipeline does it."""
    in_fp32: ClassVar[str | None] = None
    """What the names of weights match that are kept in fp32, as the class of diffusers keeps them."""
    can_tabulate: ClassVar[bool] = False
    """Whether modulation depends on the noise level alone."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder

    def skeleton(self) -> Any:
        """The model without weights, to look at its structure."""
        return without_weights(self.transformer, self.folder.config("transformer"))

    def build(
        self,
        dtype: torch.dtype,
        zero_config: dict[str, Any] | None,
        on_rows: OnRows | None = None,
        device: torch.device | str = "cpu",
        table: ModulationTable | None = None,
    ) -> Any:
        """The model with its weights.

        Args:
            dtype: This and the next three as of :func:`ccmdist.models.building.with_weights`.
            zero_config: Of DeepSpeed, or None.
            on_rows: Told the rows of all weights.
            device: Of a whole model.
            table: Takes the place of the modulation layers, where the backbone can tabulate them.

        Raises:
            ModelError: If the weights do not fit the config.
        """
        assert table is None, "modulation of this model depends on more than the noise level"
        files = self.folder.weight_files("transformer")
        return with_weights(self.skeleton(), files, dtype, zero_config, on_rows, device, self.in_fp32)

    def block_lists(self, model: nn.Module) -> list[nn.ModuleList]:
        """The lists of blocks of a model, in the order in which they run."""
        return [getattr(model, name) for name in self.folder.layout.blocks]

    def linear_names(self, model: nn.Module, targets: tuple[str, ...]) -> list[str]:
        """Names of the linears in the blocks that ``targets`` select, without those that never get a gradient.

        Raises:
            ConfigError: If a target selects nothing.
        """
        return chosen_linears(model, self.folder.layout, targets, self.dead(model))

    @abstractmethod
    def dead(self, model: nn.Module) -> list[str]:
        """Full names of the linears in blocks that reach nothing which is read."""

    def _dead_as_in(self, probe: nn.Module, model: nn.Module) -> list[str]:
        """Names in ``model`` of the linears that got no gradient in a small model whose lists have one block each."""
        last = {name: len(getattr(model, name)) - 1 for name in self.folder.layout.blocks}
        linears = {name: layer for name, layer in probe.named_modules() if isinstance(layer, nn.Linear)}
        without = [n for n, m in linears.items() if m.weight.grad is None or not m.weight.grad.any()]
        parts = [name.split(".", 2) for name in without if name.partition(".")[0] in last]
        return [f"{blocks}.{last[blocks]}.{layer}" for blocks, _, layer in parts]

    def make_blocks_leaves(self, model: nn.Module) -> None:
        """Let ZeRO-3 gather a block at once."""
        make_leaves(model, self.leaves)

    @abstractmethod
    def velocity(
        self,
        model: nn.Module,
        latents_BSC: Tensor,
        conditions_BSC: Tensor,
        text: Text,
        sigma_B: Tensor,
        token_hw: tuple[int, int],
    ) -> Tensor:
        """The model's prediction of noise - x for the target tokens, (B, S, C).

        Args:
            model: The transformer, or an engine around it.
            latents_BSC: Noisy packed latents of the target, in the model's dtype.
            conditions_BSC: Packed latents of the condition images, one after the other.
            text: Of the prompts, all of one length, in the model's dtype.
            sigma_B: Noise level of each sample, in [0, 1]; 1 is pure noise.
            token_hw: Rows and columns of the target's tokens and of those of each condition image.
        """

    def predictor(
        self, model: nn.Module, conditions_BSC: Tensor, texts: Sequence[Text], token_hw: tuple[int, int], **_: Any
    ) -> Predictor:
        """What a sampler asks at each denoise step, for one batch.

        Args:
            model: The transformer, whole, in this process.
            conditions_BSC: As of :meth:`velocity`.
            token_hw: As of :meth:`velocity`.
            texts: Of the prompts; then, where there is guidance, of the negative prompts.
            _: What only some backbones know to use, such as how Qwen-Image-Edit's blocks are run when compiled.
        """

        @torch.no_grad()
        def predict(latents_BSC: Tensor, sigma_B: Tensor) -> tuple[Tensor, ...]:
            asked = (self.velocity(model, latents_BSC, conditions_BSC, text, sigma_B, token_hw) for text in texts)
            return tuple(asked)

        return predict
