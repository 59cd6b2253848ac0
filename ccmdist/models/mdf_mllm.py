"""MDF-MLLM: levels of a U-Net fused into layers of a multimodal language model, whose state turns back on the levels.

One pass: the encoder's levels become tokens, layers of the language model attend to them, the state of the prompt's
last token scales and shifts the levels (FiLM), and decoder and head read those.

Shape suffixes: B samples, L text tokens, N tokens of a level, D width of the language model, H W rows and columns.

Source: arXiv:2509.21358; which layers, tokens, head and losses are ours (facts in README).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from ccmdist.ccm.groups import CLINICAL_GROUPS
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings
from ccmdist.models.fusion import Film, GatedCrossAttention, LevelTokens
from ccmdist.models.mdf_base import LLM
from ccmdist.models.mllm import Mllm
from ccmdist.models.unet import LevelUnet

UNET: Final = "unet"
FUSION: Final = "fusion"
"""The other parts, as modules and as prefixes of the names of their parameters."""
DECODER: Final = ("upcat_", "final_conv")


class Adapted(Protocol):
    """An adapter in a model."""

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What of it is trained, by full name."""
        ...

    def advance(self) -> None:
        """Say that the parameters have changed."""
        ...


class Fusion(nn.Module):
    """All that is new between U-Net and language model, and the head."""

    def __init__(self, settings: DiagnoseSettings, image_size_px: int, width: int) -> None:
        """For levels of images of this size, and states of this width."""
        super().__init__()
        channels = {level: settings.channels[level] for level in settings.fusion_levels}
        self.tokens, self.attention, self.film = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for level, count in channels.items():
            self.tokens[str(level)] = LevelTokens(count, image_size_px // 2**level, settings.token_grid, width)
            self.attention[str(level)] = GatedCrossAttention(width, settings.fusion_heads)
            if settings.film:
                self.film[str(level)] = Film(width, count)
        self.norm = nn.LayerNorm(width + sum(channels.values()))
        self.head = nn.Linear(width + sum(channels.values()), len(CLINICAL_GROUPS))

    def read(self, levels: list[Tensor]) -> dict[str, Tensor]:
        """Tokens (B, N, D) of each level that is fused."""
        return {name: tokens(levels[int(name)]) for name, tokens in self.tokens.items()}

    def turned(self, levels: list[Tensor], state_BD: Tensor) -> list[Tensor]:
        """The levels as the language model's state wants them."""
        return [
            self.film[name](level, state_BD) if (name := str(k)) in self.film else level
            for k, level in enumerate(levels)
        ]

    def diagnosed(self, levels: list[Tensor], state_BD: Tensor) -> Tensor:
        """Logits of the clinical groups, (B, 3)."""
        pooled = [levels[int(name)].mean(dim=(2, 3)) for name in self.tokens]
        logits_B3: Tensor = self.head(self.norm(torch.cat([state_BD, *pooled], dim=1)))
        return logits_B3


class MdfMllm(nn.Module):
    """The whole model; without levels, the bare language model with a head."""

    def __init__(self, settings: DiagnoseSettings, unet: LevelUnet | None, mllm: Mllm, fusion: Fusion) -> None:
        """Let layers of the language model call the fusion; its own modules and their names stay as they are."""
        super().__init__()
        self.settings, self.mllm = settings, mllm
        self.unet, self.llm, self.fusion = unet, mllm.model, fusion
        self.adapter: Adapted | None = None
        self._tokens: Mapping[str, Tensor] = {}
        self._attended: dict[str, Tensor] = {}
        for level, layer in enumerate(mllm.fusion_layers(), start=1):
            if level in settings.fusion_levels:
                layer.register_forward_hook(partial(self._fuse, str(level)))

    def forward(
        self, images_B1HW: Tensor, ids_BL: Tensor, last_B: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """A diagnosis.

        Args:
            images_B1HW: In [-1, 1].
            ids_BL: Token ids of image and prompt, see :class:`ccmdist.models.mllm.Prompts`.
            last_B: Place of the last token of each.

        Returns:
            Logits of the groups (B, 3); logits of nerve (B, 1, H, W), if masks have a weight; and by the name of each
            level how much the last token attends to its tokens, (B, N).
        """
        levels = [] if self.unet is None else self.unet.levels(images_B1HW)
        self._tokens, self._attended = self.fusion.read(levels), {}
        samples = torch.arange(len(images_B1HW), device=images_B1HW.device)
        state_BD = self.mllm.states(images_B1HW, ids_BL)[samples, last_B].float()
        attended = {name: weights_BLN[samples, last_B].detach() for name, weights_BLN in self._attended.items()}
        self._tokens, self._attended = {}, {}
        turned = self.fusion.turned(levels, state_BD)
        masks = self.unet.decoded(turned) if self.unet is not None and self.settings.mask_weight else None
        return self.fusion.diagnosed(turned, state_BD), masks, attended

    def parameter_sets(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is trained: name of part -> parameter name -> parameter."""
        chosen: dict[str, Callable[[str], bool]] = {FUSION: lambda name: True}
        if self.unet is not None and self.settings.train_unet:
            chosen[UNET] = self._is_used
        if self.settings.llm == "full":
            chosen[LLM] = lambda name: True
        sets = {
            part: {f"{part}.{name}": p for name, p in self.get_submodule(part).named_parameters() if is_chosen(name)}
            for part, is_chosen in chosen.items()
        }
        if self.adapter is not None:
            sets[LLM] = {f"{LLM}.{name}": parameter for name, parameter in self.adapter.parameters.items()}
        return sets

    def gates(self) -> dict[str, float]:
        """Level -> how much of what is read is added: tanh of its gate."""
        return {name: float(attention.gate.detach().tanh()) for name, attention in self.fusion.attention.items()}

    def _is_used(self, name: str) -> bool:
        """Whether a parameter of the U-Net has a part in the loss."""
        if self.settings.mask_weight:
            return True
        deeper = tuple(f"down_{level}." for level in range(max(self.settings.fusion_levels) + 1, 5))
        return not name.startswith((*DECODER, *deeper))

    def _fuse(self, name: str, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """Called when a layer of the language model has computed; what it is taken to have given."""
        states_BLD = output[0] if isinstance(output, tuple) else output
        fused_BLD, self._attended[name] = self.fusion.attention[name](states_BLD, self._tokens[name])
        return (fused_BLD, *output[1:]) if isinstance(output, tuple) else fused_BLD
