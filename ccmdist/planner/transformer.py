"""The MMDiT as its config.json describes it: which linears it has, how large they are, which of them are adapted.

The layers are those of diffusers' QwenImageTransformer2DModel. Tests compare every count with that class, and the
choice of adapted linears with :func:`ccmdist.models.mmdit.linear_names`, which has to build it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, Self

from ccmdist.errors import ConfigError, ModelError
from ccmdist.models.layout import QWEN

Stream = Literal["img", "txt", "time"]
"""What passes a linear: the tokens of target and mask, those of the text, or one vector per sample."""

PUBLISHED: Final[Mapping[str, Any]] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
}
"""Defaults of the class, which are the published model's."""
TIME_CHANNELS: Final = 256
"""Sines and cosines of a timestep, before the time embedding."""
MODULATION: Final = 6
"""Vectors by which each stream of a block is modulated: shift, scale and gate, of attention and of the MLP."""
DEAD_IN_LAST_BLOCK: Final = frozenset({"attn.add_q_proj", "attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2"})
"""Linears that reach only the last block's text output, which nobody reads; they get no adapter."""
UNREAD: Final = DEAD_IN_LAST_BLOCK - {"attn.add_q_proj"}
"""Those that no gradient reaches at all: the backward pass leaves them out. Of add_q_proj it computes zeros."""


class Linear(NamedTuple):
    """One linear layer: its name in the block, its shape, and what passes it."""

    name: str
    num_in: int
    num_out: int
    stream: Stream

    @property
    def num_weights(self) -> int:
        """Entries of its matrix, without the bias."""
        return self.num_in * self.num_out


@dataclass(frozen=True)
class Transformer:
    """Sizes of one MMDiT.

    Attributes:
        num_layers: Blocks.
        num_heads: Attention heads.
        head_width: Width of a head.
        num_in: Channels of a token that comes in.
        num_out: Channels of a token that goes out.
        text_width: Width of the text's embeddings.
        is_clean_mask_timed: 2511's zero_cond_t: the mask's tokens are modulated as at time 0.
        has_time_condition: use_additional_t_cond, two more embeddings.
    """

    num_layers: int
    num_heads: int
    head_width: int
    num_in: int
    num_out: int
    text_width: int
    is_clean_mask_timed: bool = False
    has_time_condition: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The sizes in a transformer's config.json; what it does not name is as published.

        Raises:
            ModelError: If a size is no positive whole number.
        """
        sizes = {name: config.get(name, default) for name, default in PUBLISHED.items()}
        sizes["out_channels"] = sizes["out_channels"] or sizes["in_channels"]
        for name, value in sizes.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(
                    f"transformer/config.json: {name} is {value!r}, expected a positive whole number",
                    "use the config.json that belongs to the weights",
                )
        return cls(
            num_layers=sizes["num_layers"],
            num_heads=sizes["num_attention_heads"],
            head_width=sizes["attention_head_dim"],
            num_in=sizes["in_channels"],
            num_out=sizes["patch_size"] ** 2 * sizes["out_channels"],
            text_width=sizes["joint_attention_dim"],
            is_clean_mask_timed=bool(config.get("zero_cond_t", False)),
            has_time_condition=bool(config.get("use_additional_t_cond", False)),
        )

    @property
    def width(self) -> int:
        """Of a token inside the blocks, d."""
        return self.num_heads * self.head_width

    @cached_property
    def block(self) -> tuple[Linear, ...]:
        """The linears of one block that tokens pass, in the order of the class."""
        d = self.width
        attention: dict[str, Stream] = {"to_q": "img", "to_k": "img", "to_v": "img"}
        attention |= {"add_k_proj": "txt", "add_v_proj": "txt", "add_q_proj": "txt"}
        attention |= {"to_out.0": "img", "to_add_out": "txt"}
        streams: tuple[Stream, ...] = ("img", "txt")
        found = [Linear(f"attn.{name}", d, d, stream) for name, stream in attention.items()]
        for stream in streams:
            found += [Linear(f"{stream}_mlp.net.0.proj", d, 4 * d, stream)]
            found += [Linear(f"{stream}_mlp.net.2", 4 * d, d, stream)]
        return tuple(found)

    @cached_property
    def modulation(self) -> tuple[Linear, ...]:
        """The two linears of one block that see the time alone: what a table over the noise levels replaces."""
        return tuple(Linear(f"{s}_mod.1", self.width, MODULATION * self.width, "time") for s in ("img", "txt"))

    @property
    def parameters_per_block(self) -> int:
        """Of one block, with its modulation: weights, biases and the four norms of queries and keys."""
        linears = self.block + self.modulation
        return sum(linear.num_weights + linear.num_out for linear in linears) + 4 * self.head_width

    @property
    def num_modulation_parameters(self) -> int:
        """Of all blocks."""
        return self.num_layers * sum(linear.num_weights + linear.num_out for linear in self.modulation)

    @property
    def num_time_parameters(self) -> int:
        """Of the time embedding, which a table replaces too."""
        d = self.width
        return (TIME_CHANNELS + 1) * d + (d + 1) * d + (2 * d if self.has_time_condition else 0)

    @property
    def num_outer_parameters(self) -> int:
        """Of what lies around the blocks, without the time embedding."""
        d = self.width
        text = self.text_width + (self.text_width + 1) * d
        return text + (self.num_in + 1) * d + (d + 1) * 2 * d + (d + 1) * self.num_out

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return self.num_layers * self.parameters_per_block + self.num_time_parameters + self.num_outer_parameters

    def num_resident_vectors(self, is_tabled: bool) -> int:
        """Of the model as it is trained, values of biases and scales, which are 0.03 % of it."""
        linears = self.block + (() if is_tabled else self.modulation)
        blocks = self.num_layers * (sum(linear.num_out for linear in linears) + 4 * self.head_width)
        # Biases of tokens in, text in, the last norm (2) and, without a table, the time embedding (2).
        around = (4 if is_tabled else 6) * self.width
        return blocks + around + self.text_width + self.num_out

    def num_resident_parameters(self, is_tabled: bool) -> int:
        """Of the model as it is trained: without modulation and time embedding when these are tabulated."""
        return self.num_parameters - is_tabled * (self.num_modulation_parameters + self.num_time_parameters)

    def adapted(self, targets: tuple[str, ...]) -> Iterator[tuple[int, Linear]]:
        """Number of the block and linear, for every linear that gets an adapter.

        Args:
            targets: As in the adapter's settings: "attn", "mlp", or suffixes of names such as "attn.to_q".

        Raises:
            ConfigError: If a target selects nothing.
        """
        linears = self.modulation[:1] + self.block[:8] + self.block[8:10] + self.modulation[1:] + self.block[10:]
        for target in targets:
            if not any(QWEN.selects(target, linear.name) for linear in linears):
                raise ConfigError(
                    f"adapter.targets: '{target}' matches none of the linear layers in the blocks",
                    f"use attn, mlp, or suffixes of {', '.join(linear.name for linear in linears)}",
                )
        for index in range(self.num_layers):
            dead = DEAD_IN_LAST_BLOCK if index == self.num_layers - 1 else ()
            for linear in linears:
                if linear.name not in dead and any(QWEN.selects(target, linear.name) for target in targets):
                    yield index, linear

    def is_modulation_adapted(self, targets: tuple[str, ...]) -> bool:
        """Whether an adapter sits in the modulation, which then cannot be tabulated."""
        return any(linear.stream == "time" for _, linear in self.adapted(targets))
