"""Floating-point operations of a forward pass and of a training step, exactly, without building anything.

A multiplication and an addition count as two. Counted is what torch's FlopCounterMode counts, matrix products and
attention; all else is bound by memory, not by arithmetic. Per sample, for T tokens in a linear of n x m: 2 T n m.

Attention over T tokens of width d: 4 T^2 d forward; backward 8 T^2 d, and 10 T^2 d when a flash kernel forms the
scores again (Dao, arXiv:2307.08691, section 3.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.models.template import CONDITION_EDGE_PX, Version
from ccmdist.planner.transformer import TIME_CHANNELS, UNREAD, Linear, Stream, Transformer

Recompute = Literal["full", "selective", "none"]
PX_PER_VISION_TOKEN: Final = 28
PROMPT_TOKENS: Final = 60
"""Assumed length of our prompts with the words around them; the cache knows it exactly."""
FLASH_BACKWARD: Final = 2.5
PLAIN_BACKWARD: Final = 2.0
TEXT_INPUTS: Final = frozenset({"attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"})
"""In the first block these see the text itself, which needs no gradient."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of one sample: of image, of mask, and of the text stream, in which the VL model tells the mask again.

    Where a hole is filled, the image with the hole stands beside the mask.
    """

    target: int
    mask: int
    text: int
    holed: int = 0

    @property
    def image(self) -> int:
        """Of the image stream."""
        return self.target + self.mask + self.holed

    @property
    def total(self) -> int:
        """Of the joint attention."""
        return self.image + self.text

    def of(self, stream: Stream) -> int:
        """How many pass a linear of this stream."""
        return {"img": self.image, "txt": self.text, "time": 1}[stream]


def tokens(
    image_size_px: int, version: Version = "2509", num_text: int | None = None, is_holed: bool = False
) -> Tokens:
    """Tokens of a square sample whose mask has the image's size.

    Args:
        image_size_px: Edge of image and mask.
        version: Of Qwen-Image-Edit: it decides the size at which the VL model sees the mask.
        num_text: Tokens of the text stream if they are known, else the VL model's and a prompt of ours.
        is_holed: Whether a hole of the sample is filled.
    """
    image = (image_size_px // PX_PER_TOKEN) ** 2
    return Tokens(image, image, num_text or vision_tokens(version) + PROMPT_TOKENS, is_holed * image)


def vision_tokens(version: Version) -> int:
    """Tokens that the VL model makes of the mask."""
    return round(CONDITION_EDGE_PX[version] / PX_PER_VISION_TOKEN) ** 2


@dataclass(frozen=True)
class StepFlops:
    """Operations for one sample.

    Attributes:
        forward: Of the model with its adapter.
        backward: Gradients with respect to activations and adapter; the frozen weights get none.
        recompute: Of the forward pass that is done again.
    """

    forward: float
    backward: float
    recompute: float

    @property
    def model(self) -> float:
        """Useful work: what a machine with endless memory would do."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        """All that is done."""
        return self.model + self.recompute

    def __add__(self, other: "StepFlops") -> "StepFlops":
        """The sum, part by part."""
        sums = (self.forward + other.forward, self.backward + other.backward, self.recompute + other.recompute)
        return StepFlops(*sums)

    def __mul__(self, share: float) -> "StepFlops":
        """A share of every part."""
        return StepFlops(self.forward * share, self.backward * share, self.recompute * share)


def forward_flops(model: Transformer, of: Tokens, is_tabled: bool = False) -> float:
    """Operations of one forward pass of the model without an adapter, for one sample."""
    return model.num_layers * _block_flops(model, of, is_tabled) + _outer_flops(model, of, is_tabled)


def step_flops(
    model: Transformer,
    of: Tokens,
    lora_rank: int,
    targets: tuple[str, ...],
    recompute: Recompute,
    is_tabled: bool = False,
    attention_backward: float = FLASH_BACKWARD,
) -> StepFlops:
    """Operations of one training step, for one sample.

    Args:
        model: The MMDiT.
        of: Its tokens.
        lora_rank: Of the adapter.
        targets: Which linears have one.
        recompute: What the backward pass computes again. "selective" keeps what matrix products and attention gave.
        is_tabled: Whether a table replaces the modulation.
        attention_backward: Operations of attention's backward pass, relative to its forward pass.

    Raises:
        ConfigError: If a target selects nothing.
    """
    adapted = list(model.adapted(targets))
    adapter = sum(_adapter_flops(model, linear, of, lora_rank) for _, linear in adapted)
    attention = model.num_layers * _attention_flops(model, of)
    # An adapter's backward has two products for its weights, and two on the way to its input.
    to_input = sum(
        2 * _times(model, linear, of) * lora_rank * linear.num_in for i, linear in adapted if _has_dx(i, linear)
    )
    to_rest = sum(
        2 * _times(model, linear, of) * lora_rank * (linear.num_in + 2 * linear.num_out) for _, linear in adapted
    )
    backward = _dx_flops(model, of) + attention_backward * attention + to_input + to_rest
    again = model.num_layers * _block_flops(model, of, is_tabled) + adapter if recompute == "full" else 0.0
    return StepFlops(forward_flops(model, of, is_tabled) + adapter, backward, again)


def norm_flops(model: Transformer, lora_rank: int, targets: tuple[str, ...]) -> float:
    """Operations of one evaluation of all WDLoRA norms, due once per optimizer step: W A^T, A A^T and B (A A^T)."""
    linears = [linear for _, linear in model.adapted(targets)]
    return sum(2.0 * lora_rank * (i.num_weights + lora_rank * (i.num_in + i.num_out)) for i in linears)


def _linear_flops(linears: Iterable[Linear], of: Tokens) -> float:
    return float(sum(2 * of.of(linear.stream) * linear.num_weights for linear in linears))


def _attention_flops(model: Transformer, of: Tokens) -> float:
    return 4.0 * of.total**2 * model.width


def _block_flops(model: Transformer, of: Tokens, is_tabled: bool) -> float:
    flops = _linear_flops(model.block, of) + _attention_flops(model, of)
    if not is_tabled:
        flops += sum(2 * _times(model, linear, of) * linear.num_weights for linear in model.modulation)
    return flops


def _outer_flops(model: Transformer, of: Tokens, is_tabled: bool) -> float:
    """Of the layers around the blocks: tokens in, text in, time, and the target's and mask's tokens out."""
    d = model.width
    time = 0 if is_tabled else (1 + model.is_clean_mask_timed) * (TIME_CHANNELS * d + d * d)
    return 2.0 * (of.image * d * (model.num_in + model.num_out) + of.text * model.text_width * d + 2 * d * d + time)


def _times(model: Transformer, linear: Linear, of: Tokens) -> int:
    """Rows of a linear's input; 2511 modulates its image stream for two times."""
    return of.of(linear.stream) * (1 + (model.is_clean_mask_timed and linear.name == "img_mod.1"))


def _adapter_flops(model: Transformer, linear: Linear, of: Tokens, lora_rank: int) -> float:
    return 2.0 * _times(model, linear, of) * lora_rank * (linear.num_in + linear.num_out)


def _has_dx(block: int, linear: Linear) -> bool:
    """Whether a gradient is wanted for a linear's input: not for the text itself, nor for a time."""
    return linear.stream != "time" and not (block == 0 and linear.name in TEXT_INPUTS)


def _dx_flops(model: Transformer, of: Tokens) -> float:
    """Of the gradients of all linears' inputs: as much as their forward, but for what needs or gets none."""
    every = [(i, linear) for i in range(model.num_layers) for linear in model.block]
    last = model.num_layers - 1
    wanted = [linear for i, linear in every if _has_dx(i, linear) and not (i == last and linear.name in UNREAD)]
    # Tokens in and out: ZeRO-3 needs a gradient of the model's input.
    return _linear_flops(wanted, of) + 2.0 * of.image * model.width * (model.num_in + model.num_out)
