"""How large a model a benchmark of a GPU measures, and on what: the whole one on a GPU, a small part of it on a CPU.

Only the whole model at 384 px on a GPU is held to a target. What a CPU measures shows that scripts work, and says so.
"""

import argparse
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch

from ccmdist.models.layout import QWEN
from ccmdist.models.sizes import NOISE_SCHEDULE
from ccmdist.planner.flops import Tokens
from ccmdist.planner.hardware import GPUS
from ccmdist.planner.transformer import PUBLISHED, Transformer

FULL: Final = {"blocks": 60, "heads": 24, "image_size_px": 384, "text_tokens": 256}
"""The published model, and 1,408 tokens: 576 of target and of mask each, 196 of the VL model, 60 of the prompt."""
PART: Final = {"blocks": 2, "heads": 24, "image_size_px": 64, "text_tokens": 32}
"""What a CPU core computes in a minute."""
HELP: Final = {
    "blocks": "of the model",
    "heads": "of 128 channels: 24 are the full width of 3072",
    "image_size_px": "edge of image and mask",
    "text_tokens": "of the text stream",
}


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured.

    Attributes:
        device: "cuda" or "cpu".
        blocks: Of the MMDiT.
        heads: Of 128 channels each.
        image_size_px: Edge of image and mask.
        text_tokens: Of the text stream.
    """

    device: str
    blocks: int
    heads: int
    image_size_px: int
    text_tokens: int

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Let a command line change the sizes; by default they follow the device."""
        parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="a GPU if there is one")
        for name, what in HELP.items():
            told = f"{what} (default: {FULL[name]} on a GPU, {PART[name]} on a CPU)"
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=None, help=told)

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> Self:
        """The sizes that a command line asks for."""
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        sizes = FULL if device == "cuda" else PART
        given = {name: getattr(arguments, name) for name in sizes if getattr(arguments, name) is not None}
        return cls(device, **(sizes | given))

    @property
    def is_full(self) -> bool:
        """Whether the whole model is measured on a GPU, so that targets apply."""
        return self.device == "cuda" and asdict(self) == {"device": "cuda"} | FULL

    def limit(self, bound: float) -> float | None:
        """A bound that the whole model on a GPU must keep; None for anything else."""
        return bound if self.is_full else None

    def anchor(self, published: str | None) -> str | None:
        """A published figure, which only the whole model on a GPU is compared with."""
        return published if self.is_full else None

    def file(self, name: str) -> str:
        """Name of the results: those of a part of the model never replace those of the whole."""
        return f"gpu_{name}" + ("" if self.is_full else "_cpu" if self.device == "cpu" else "_part")

    def about(self, device_name: str) -> str:
        """For the claim of a row: on what, how much of the model."""
        whole = self.blocks == FULL["blocks"] and self.heads == FULL["heads"]
        model = "20.4 B model" if whole else f"{self.blocks} blocks of width {self.transformer.width}"
        where = device_name if self.device == "cuda" else "on a CPU"
        return f"{where}, {model}, {self.image_size_px} px, {self.tokens.total:,} tokens"

    @property
    def config(self) -> dict[str, Any]:
        """The transformer's config.json."""
        return {**PUBLISHED, "num_layers": self.blocks, "num_attention_heads": self.heads}

    @property
    def transformer(self) -> Transformer:
        """The same as the planner sees it."""
        return Transformer.from_config(self.config)

    @property
    def edge(self) -> int:
        """Tokens along an edge of image or mask."""
        return self.image_size_px // 16

    @property
    def tokens(self) -> Tokens:
        """Of a sample."""
        return Tokens(self.edge**2, self.edge**2, self.text_tokens)


class RandomFolder:
    """Stands for a model folder: the configs of a scale, no weights."""

    layout = QWEN

    def __init__(self, scale: Scale) -> None:
        self._config = scale.config

    def config(self, component: str) -> dict[str, Any]:
        """Of the transformer, which alone is there."""
        assert component == "transformer", component
        return self._config

    def noise_schedule(self) -> dict[str, Any]:
        """As published."""
        return dict(NOISE_SCHEDULE)


def device_name(device: torch.device) -> str:
    """As it stands in a claim."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "on a CPU"


def gpu_key(name: str) -> str | None:
    """The planner's name of a GPU; None if it knows none like it."""
    found = [key for key in GPUS if key.split("-")[0].upper() in name.upper().replace(" ", "")]
    pcie = [key for key in found if key.endswith("pcie") and "PCIE" in name.upper()]
    return (pcie or found or [None])[0]
