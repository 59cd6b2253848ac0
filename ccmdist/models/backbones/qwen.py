"""Qwen-Image-Edit; what it computes is said in :mod:`ccmdist.models.mmdit` and :mod:`ccmdist.models.sampling`."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor, nn

from ccmdist.models import mmdit
from ccmdist.models.backbones.backbone import NUM_PROBE_TEXT_TOKENS, PROBE_HW, Backbone, Predictor, Text
from ccmdist.models.checkpoint_io import OnRows
from ccmdist.models.modulation_table import ModulationTable
from ccmdist.models.sampling import BlockPass, GuidedVelocity, block_pass


class Qwen(Backbone):
    """Of any version; the mask is seen as further image tokens, and by the text encoder."""

    transformer = QwenImageTransformer2DModel
    leaves: ClassVar[Mapping[str, type[nn.Module]]] = {"transformer_blocks": mmdit.PositionalBlock}
    guidance = "rescaled"
    can_tabulate = True

    def build(
        self,
        dtype: torch.dtype,
        zero_config: dict[str, Any] | None,
        on_rows: OnRows | None = None,
        device: torch.device | str = "cpu",
        table: ModulationTable | None = None,
    ) -> QwenImageTransformer2DModel:
        """See :meth:`Backbone.build`."""
        return mmdit.build(self.folder, dtype, zero_config, on_rows, device=device, table=table)

    def dead(self, model: nn.Module) -> list[str]:
        """See :meth:`Backbone.dead`."""
        assert isinstance(model, QwenImageTransformer2DModel), type(model)
        return mmdit.dead(model)

    def velocity(
        self,
        model: nn.Module,
        latents_BSC: Tensor,
        conditions_BSC: Tensor,
        text: Text,
        sigma_B: Tensor,
        token_hw: tuple[int, int],
    ) -> Tensor:
        """See :meth:`Backbone.velocity`."""
        prompt_embeds_BLD = text["prompt_embeds"]
        return mmdit.velocity(model, latents_BSC, conditions_BSC, prompt_embeds_BLD, sigma_B, token_hw, token_hw)

    def predictor(
        self,
        model: nn.Module,
        conditions_BSC: Tensor,
        texts: Sequence[Text],
        token_hw: tuple[int, int],
        run_block: BlockPass = block_pass,
        **_: Any,
    ) -> Predictor:
        """All branches in one pass, see :class:`GuidedVelocity`."""
        assert isinstance(model, QwenImageTransformer2DModel), type(model)
        embeds = [text["prompt_embeds"] for text in texts]
        return GuidedVelocity(model, conditions_BSC, embeds, token_hw, token_hw, run_block)


def predicted(model: QwenImageTransformer2DModel, source: torch.Generator) -> Tensor:
    """What a model, alone or as a part of a stock pipeline, predicts on inputs drawn from ``source``."""
    rows, columns = PROBE_HW
    latents = torch.randn(2, 1, rows * columns, model.config.in_channels, generator=source)
    prompt_embeds = torch.randn(1, NUM_PROBE_TEXT_TOKENS, model.config.joint_attention_dim, generator=source)
    return mmdit.velocity(model, latents[0], latents[1], prompt_embeds, torch.tensor([0.5]), PROBE_HW, PROBE_HW)
