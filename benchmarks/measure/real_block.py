"""One block of the MMDiT of any width under an adapter: an optimizer step's forward and backward passes, on a CPU."""

import copy
from dataclasses import dataclass

import torch
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ccmdist.adapters.injection import AdaptedLinears, inject, row_squares_of
from ccmdist.config.train import AdapterSettings

HEAD_DIM = 128


@dataclass(frozen=True)
class Inputs:
    """What a block is given; hidden states (1, tokens, dim)."""

    image: Tensor
    text: Tensor
    modulation: Tensor
    rotary: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, dim: int, tokens: tuple[int, int]) -> "Inputs":
        hidden = [torch.randn(1, count, dim, dtype=torch.bfloat16, requires_grad=True) for count in tokens]
        rotary = [torch.polar(torch.ones(count, HEAD_DIM // 2), torch.rand(count, HEAD_DIM // 2)) for count in tokens]
        return cls(*hidden, torch.randn(1, dim, dtype=torch.bfloat16), (rotary[0], rotary[1]))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.image, self.text, self.modulation, *self.rotary]


@dataclass(frozen=True)
class Side:
    """A block under one adapter."""

    block: nn.Module
    adapted: AdaptedLinears | None = None

    def step(self, inputs: Inputs, accumulation: int = 1) -> None:
        """The forward and backward passes of an optimizer step."""
        if self.adapted is not None:
            self.adapted.advance()
        for _ in range(accumulation):
            image, text = checkpoint(self._forward, inputs, inputs.image, inputs.text, use_reentrant=False)
            (image.float().mean() + text.float().mean()).backward()
            inputs.image.grad = inputs.text.grad = None

    def whole_step(self, inputs: Inputs, accumulation: int) -> None:
        """A step that begins without gradients."""
        self.drop_gradients()
        self.step(inputs, accumulation)

    def drop_gradients(self) -> None:
        """As an optimizer does after its step."""
        for parameter in self.block.parameters():
            parameter.grad = None

    def _forward(self, inputs: Inputs, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        return self.block(
            hidden_states=image,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=None,
            temb=inputs.modulation,
            image_rotary_emb=inputs.rotary,
        )


def targets_of(block: nn.Module) -> list[str]:
    """Names of the linears that are adapted: attention and MLPs, not the modulation."""
    linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in linears if "_mod" not in name]


def ours(block: nn.Module, settings: AdapterSettings) -> Side:
    """A copy of ``block`` under one of our adapters."""
    block = copy.deepcopy(block)
    names = targets_of(block)
    return Side(block, inject(block, names, settings, row_squares_of(block, names), seed=0))


def frozen_block(dim: int) -> nn.Module:
    """Random bf16 weights."""
    return QwenImageTransformerBlock(dim, dim // HEAD_DIM, HEAD_DIM).bfloat16().requires_grad_(False)
