"""Both stages of MDF-MLLM (arXiv:2509.21358): a U-Net that segments, and a language model that reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from ccmdist.config.objectives.objective import OfObjective

UNET_FACTOR: Final = 16
"""Images over the deepest level of the U-Net that segments and diagnoses; image_size_px is always a multiple."""


class UnetSettings(OfObjective):
    """What objectives with a U-Net on pixels have in common: MONAI's BasicUNet, whose four levels others read."""

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    draws = False
    channels: tuple[int, int, int, int, int, int] = (32, 32, 64, 128, 256, 32)
    """Of the image's own level, the four below, each half as large as the one before, and the last convolution."""


class SegmentSettings(UnetSettings):
    """Nerve masks of frames by a U-Net from scratch: what MDF-MLLM's U-Net is before it learns to diagnose."""

    serves = "give it as objective.unet to objective.kind diagnose, and draw with another network"
    kind: Literal["segment"] = "segment"


class DiagnoseSettings(UnetSettings):
    """The clinical group of a frame by MDF-MLLM: levels of a U-Net read by layers of a multimodal language model.

    After arXiv:2509.21358, of which no code was found: depths, tokens, heads, FiLM's place and all sizes are ours.
    """

    serves = "it tells groups of frames; draw with another network"
    made_by: ClassVar[Mapping[str, str]] = {"unet": "train objective.kind segment first (configs/train/segment.yaml)"}
    kind: Literal["diagnose"] = "diagnose"
    mllm: Path
    """A local folder of Mllama (LLaMA 3.2 Vision) or Qwen2.5-VL in transformers' layout, with its tokenizer."""
    unet: Path | None = None
    """What a run of `segment` has left, RUN/network; None: the U-Net begins with random weights."""
    llm: Literal["wdlora", "lora", "full", "frozen"] = "wdlora"
    """How the language model is trained: by an adapter on its decoder's linears, as a whole, or not at all."""
    llm_dtype: Literal["bf16", "fp32"] = "bf16"
    """How its weights are held; those that are trained are always fp32."""
    lora_rank: int = Field(16, ge=1, le=1024)
    """Of the adapter; its scale is 1."""
    train_unet: bool = True
    fusion_levels: tuple[int, ...] = (1, 2, 3, 4)
    """Of the U-Net, from fine to coarse, that the language model reads. None: it is bare, without U-Net and FiLM."""
    token_grid: int = Field(12, ge=1)
    """Each level is read as so many by so many tokens."""
    fusion_heads: int = Field(8, ge=1)
    """Of the attention to a level's tokens."""
    film: bool = True
    """Let the language model's state scale and shift the levels that it reads, before decoder and head see them."""
    mask_weight: float = Field(0.5, ge=0)
    """Of the loss of the nerve mask that the U-Net finds, beside that of the group; 0 for none."""

    @property
    def files(self) -> Mapping[str, Path]:
        """See :class:`OfObjective`."""
        return {"mllm": self.mllm} | ({} if self.unet is None else {"unet": self.unet})

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        if (edge := image_size_px // UNET_FACTOR) % self.token_grid:
            where = f"the {edge} px of level 4, with data.image_size_px {image_size_px}"
            raise ValueError(f"objective.token_grid: {self.token_grid} does not divide {where}")

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        levels = self.fusion_levels
        if len(set(levels)) < len(levels) or not set(levels) <= {1, 2, 3, 4}:
            raise ValueError(f"fusion_levels: {list(levels)} must name levels 1 to 4, each at most once")
        if self.unet is not None and not levels:
            raise ValueError(f"unet: {self.unet} is of no use without fusion_levels; set it to null")
        if self.unet is None and levels and not self.train_unet:
            raise ValueError("train_unet: false, but the U-Net begins with random weights; name its folder as unet")
        if self.llm == "full" and self.llm_dtype != "fp32":
            raise ValueError(f"llm_dtype: {self.llm_dtype} is too coarse for weights that are trained; set fp32")
        return self
