"""Kandinsky 5 I2I: text blocks, then visual blocks that attend to the text; the mask as further channels.

Shape suffixes: B samples, S packed latent tokens, C channels, h w latent rows and columns.
"""

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_kandinsky import (
    Kandinsky5TransformerDecoderBlock,
    Kandinsky5TransformerEncoderBlock,
)
from torch import Tensor, nn

from ccmdist.models.backbones.backbone import NUM_PROBE_TEXT_TOKENS, PROBE_HW, Backbone, Text
from ccmdist.models.leaf_blocks import positional

NUM_TIMES: Final = 1000
"""The model is told sigma in thousandths."""


class Kandinsky(Backbone):
    """Source: diffusers' Kandinsky5I2IPipeline."""

    transformer = Kandinsky5Transformer3DModel
    text = ("prompt_embeds", "pooled_prompt_embeds")
    leaves: ClassVar[Mapping[str, type[nn.Module]]] = {
        "text_transformer_blocks": positional(Kandinsky5TransformerEncoderBlock, ("x",)),
        "visual_transformer_blocks": positional(Kandinsky5TransformerDecoderBlock, ("visual_embed", "text_embed")),
    }
    in_fp32 = r"^time_embeddings\.|modulation"

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
        return _asked(model, latents_BSC, conditions_BSC, text, sigma_B, token_hw)

    @torch.enable_grad()
    def dead(self, model: nn.Module) -> list[str]:
        """See :meth:`Backbone.dead`. Found by a backward pass through a small model of the same class."""
        config = {name: value for name, value in self.folder.config("transformer").items() if not name.startswith("_")}
        head_dim = sum(config["axes_dims"])
        narrow = {"model_dim": head_dim, "ff_dim": 8, "time_dim": 8, "in_text_dim": 8, "in_text_dim2": 8}
        few = {"num_text_blocks": min(config["num_text_blocks"], 1), "num_visual_blocks": 1}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            probe = Kandinsky5Transformer3DModel.from_config({**config, **narrow, **few})
            for name, parameter in probe.named_parameters():
                if "modulation" in name:  # zero in a new model: nothing in its blocks would reach anything
                    nn.init.normal_(parameter)
            # Flash kernels, which another model of this process may run on, take neither fp32 nor a CPU.
            with attention_backend("native"):
                predicted(probe, torch.Generator().manual_seed(0)).square().sum().backward()
        return self._dead_as_in(probe, model)


def predicted(model: Kandinsky5Transformer3DModel, source: torch.Generator) -> Tensor:
    """What a model, alone or as a part of a stock pipeline, predicts on inputs drawn from ``source``."""
    config, num_tokens = model.config, PROBE_HW[0] * PROBE_HW[1]
    latents, conditions = torch.randn(2, 1, num_tokens, 4 * config.in_visual_dim, generator=source)
    text = {
        "prompt_embeds": torch.randn(1, NUM_PROBE_TEXT_TOKENS, config.in_text_dim, generator=source),
        "pooled_prompt_embeds": torch.randn(1, config.in_text_dim2, generator=source),
    }
    return _asked(model, latents, conditions, text, torch.tensor([0.5]), PROBE_HW)


def _asked(
    model: nn.Module,
    latents_BSC: Tensor,
    conditions_BSC: Tensor,
    text: Text,
    sigma_B: Tensor,
    token_hw: tuple[int, int],
) -> Tensor:
    noisy, condition = (_opened(tokens, token_hw) for tokens in (latents_BSC, conditions_BSC))
    visual = torch.cat([noisy, condition, torch.ones_like(noisy[..., :1])], dim=-1)
    embeds_BLD, device = text["prompt_embeds"].detach(), visual.device
    if torch.is_grad_enabled():
        # ZeRO-3 gathers a leaf block again for its backward pass only if an input of the block has a gradient.
        visual.requires_grad_()
        embeds_BLD = embeds_BLD.requires_grad_()
    velocity_B1hwC = model(
        hidden_states=visual,
        encoder_hidden_states=embeds_BLD,
        pooled_projections=text["pooled_prompt_embeds"],
        timestep=NUM_TIMES * sigma_B.float(),
        visual_rope_pos=[torch.arange(count, device=device) for count in (1, *token_hw)],
        text_rope_pos=torch.arange(embeds_BLD.shape[1], device=device),
        return_dict=False,  # gives the tensor itself
    )
    return _packed(velocity_B1hwC, token_hw)


def _opened(tokens_BSC: Tensor, token_hw: tuple[int, int]) -> Tensor:
    """Packed latents as the model takes them, (B, 1, h, w, C/4): one frame, channels last."""
    rows, columns = token_hw
    patches = tokens_BSC.unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return patches.permute(0, 1, 4, 2, 5, 3).reshape(len(tokens_BSC), 1, 2 * rows, 2 * columns, -1)


def _packed(frame_B1hwC: Tensor, token_hw: tuple[int, int]) -> Tensor:
    """The inverse of :func:`_opened`."""
    rows, columns = token_hw
    patches = frame_B1hwC.reshape(len(frame_B1hwC), rows, 2, columns, 2, -1).permute(0, 1, 3, 5, 2, 4)
    return patches.reshape(len(frame_B1hwC), rows * columns, -1)
