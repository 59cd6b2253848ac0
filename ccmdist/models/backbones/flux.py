"""FLUX.1: blocks of two streams, then of one; the text encoders never see the mask.

Kontext is shown it as further image tokens, Control as further channels of the target's.

Shape suffixes: B samples, S packed latent tokens of target or conditions, C channels, L text tokens.
"""

from collections.abc import Mapping
from typing import ClassVar, Final

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn

from ccmdist.models.backbones.backbone import NUM_PROBE_TEXT_TOKENS, PROBE_HW, Backbone, Text
from ccmdist.models.leaf_blocks import positional
from ccmdist.models.model_folder import ModelFolder

EMBEDDED_GUIDANCE: Final = 3.5
"""What the distilled model is told its guidance is, in training as in sampling: the stock pipeline's default."""
STREAMS: Final = ("hidden_states", "encoder_hidden_states")


class FluxKontext(Backbone):
    """The condition images as further tokens. Source: diffusers' FluxKontextPipeline."""

    transformer = FluxTransformer2DModel
    text = ("prompt_embeds", "pooled_prompt_embeds")
    leaves: ClassVar[Mapping[str, type[nn.Module]]] = {
        "transformer_blocks": positional(FluxTransformerBlock, STREAMS),
        "single_transformer_blocks": positional(FluxSingleTransformerBlock, STREAMS),
    }

    def __init__(self, folder: ModelFolder) -> None:
        """Take a folder; its transformer's config is read here, for a model under DeepSpeed has another."""
        super().__init__(folder)
        self._is_told_guidance = folder.is_told_guidance

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
        tokens, num_images = self._arranged(latents_BSC, conditions_BSC)
        if torch.is_grad_enabled():
            # ZeRO-3 gathers a leaf block again for its backward pass only if an input of the block has a gradient.
            tokens.requires_grad_()
        embeds_BLD = text["prompt_embeds"]
        guidance_B = torch.full_like(sigma_B, EMBEDDED_GUIDANCE, dtype=tokens.dtype)
        return model(
            hidden_states=tokens,
            encoder_hidden_states=embeds_BLD,
            pooled_projections=text["pooled_prompt_embeds"],
            timestep=sigma_B.to(tokens.dtype),  # the pipelines hand over t / 1000, which is sigma
            img_ids=torch.cat([image_ids(token_hw, number) for number in range(num_images)]).to(tokens.device),
            txt_ids=torch.zeros(embeds_BLD.shape[1], 3, device=tokens.device),
            guidance=guidance_B if self._is_told_guidance else None,
            return_dict=False,
        )[0][:, : latents_BSC.shape[1]]

    def _arranged(self, latents_BSC: Tensor, conditions_BSC: Tensor) -> tuple[Tensor, int]:
        """The image tokens that the model is given, and of how many images they are."""
        return torch.cat([latents_BSC, conditions_BSC], dim=1), 1 + conditions_BSC.shape[1] // latents_BSC.shape[1]

    @torch.enable_grad()
    def dead(self, model: nn.Module) -> list[str]:
        """See :meth:`Backbone.dead`; none where single-stream blocks read the text after the last of two streams.

        Found by a backward pass through a narrow model of the same class and configuration.
        """
        config = {name: value for name, value in self.folder.config("transformer").items() if not name.startswith("_")}
        num_single = min(config.get("num_single_layers", 38), 1)
        narrow = {"num_layers": 1, "num_single_layers": num_single, "num_attention_heads": 1, "joint_attention_dim": 8}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            probe = FluxTransformer2DModel.from_config({**config, **narrow, "pooled_projection_dim": 8})
            latents, conditions = torch.randn(1, 8, probe.out_channels).split(4, dim=1)
            text = {"prompt_embeds": torch.randn(1, 3, 8), "pooled_prompt_embeds": torch.randn(1, 8)}
            # Flash kernels, which another model of this process may run on, take neither fp32 nor a CPU.
            with attention_backend("native"):
                predicted = self.velocity(probe, latents, conditions, text, torch.rand(1), (2, 2))
            predicted.square().sum().backward()
        return self._dead_as_in(probe, model)


class FluxControl(FluxKontext):
    """The condition image as further channels. Source: diffusers' FluxControlPipeline."""

    def _arranged(self, latents_BSC: Tensor, conditions_BSC: Tensor) -> tuple[Tensor, int]:
        return torch.cat([latents_BSC, conditions_BSC], dim=2), 1


def predicted(model: FluxTransformer2DModel, source: torch.Generator) -> Tensor:
    """What a model, alone or as a part of a stock pipeline, predicts on inputs drawn from ``source``."""
    config, rows, columns = model.config, *PROBE_HW
    return model(
        hidden_states=torch.randn(1, 2 * rows * columns, config.in_channels, generator=source),
        encoder_hidden_states=torch.randn(1, NUM_PROBE_TEXT_TOKENS, config.joint_attention_dim, generator=source),
        pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=source),
        timestep=torch.tensor([0.5]),
        img_ids=torch.cat([image_ids(PROBE_HW, number) for number in range(2)]),
        txt_ids=torch.zeros(NUM_PROBE_TEXT_TOKENS, 3),
        guidance=torch.tensor([EMBEDDED_GUIDANCE]) if config.guidance_embeds else None,
        return_dict=False,
    )[0]


def image_ids(token_hw: tuple[int, int], number: int) -> Tensor:
    """Number of the image, row and column of each of its tokens, fp32 (rows columns, 3), as the model asks for them."""
    rows, columns = token_hw
    ids = torch.zeros(rows, columns, 3)
    ids[..., 0] = number
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)[None, :]
    return ids.view(rows * columns, 3)
