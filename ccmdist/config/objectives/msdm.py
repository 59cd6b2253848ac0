"""Both stages of MSDM (arXiv:2505.05573)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from ccmdist.config.objectives.objective import OfObjective


class MsdmVaeSettings(OfObjective):
    """The VAE of MSDM from scratch: diffusers' AutoencoderKL on the pixels of frames and masks.

    Loss, latent channels and the real configuration's sizes as in the released code; crops of masks and L1 are ours.
    """

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    draws = False
    serves = "give it as data.model to `ccmdist precompute`, train objective.kind msdm on it, and draw with that"
    kind: Literal["msdm_vae"] = "msdm_vae"
    channels: tuple[int, ...] = Field((64, 128, 256, 512), min_length=1, max_length=6)
    """Of the levels, each half as large as the one before: latents have 1 / 2^(levels - 1) of the image's edge."""
    latent_channels: int = Field(8, ge=1, le=64)
    layers_per_block: int = Field(2, ge=1)
    norm_groups: int = Field(8, ge=1)
    crop_px: int = Field(256, ge=16)
    """Edge of the squares that are cut from images; where they lie is drawn for each sample."""
    mask_share: float = Field(0.2, ge=0, lt=1)
    """Of the crops, those that show the nerve mask, whose latents are what the diffusion model is conditioned on."""
    mse: float = Field(1.0, ge=0)
    l1: float = Field(0.0, ge=0)
    """Weight of the mean absolute difference."""
    ssim: float = Field(1.0, ge=0)
    """Weight of 1 - SSIM."""
    kl: float = Field(1e-6, ge=0)
    """Weight of the divergence from a normal distribution, summed over a sample's latents."""
    perceptual: float = Field(1.0, ge=0)
    """Weight of LPIPS; without `perceptual_weights` there is none, and the log says so."""
    perceptual_weights: Path | None = None
    """A local file with the convolutions of VGG16, as torchvision names them; checkpoints hold to its content."""
    text_encoder: Path | None = None
    """A local folder of a transformers BERT or CLIP text model, with its tokenizer, which becomes part of the model
    folder that the run leaves. None: a tiny one with random weights, for trials. Checkpoints hold to its content."""
    max_text_tokens: int = Field(64, ge=8)
    """Length to which all prompts are padded, and which none may exceed; less where the encoder takes less."""

    @model_validator(mode="after")
    def _channels_fit_norms(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not divide into {self.norm_groups} groups")
        if not self.mse and not self.l1:
            raise ValueError("mse, l1: one of them must be above 0, or brightness is not learnt")
        return self

    @property
    def files(self) -> Mapping[str, Path]:
        """See :class:`OfObjective`."""
        named = {"text_encoder": self.text_encoder, "perceptual_weights": self.perceptual_weights}
        return {name: path for name, path in named.items() if path is not None}

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        factor = 2 ** (len(self.channels) - 1)
        for name, edge_px in (("data.image_size_px", image_size_px), ("objective.crop_px", self.crop_px)):
            if edge_px % factor:
                lower = edge_px // factor * factor
                raise ValueError(
                    f"objective.channels: {len(self.channels)} levels need an edge that {factor} divides; {name} is "
                    f"{edge_px}, the nearest are {lower} and {lower + factor}"
                )
        if self.crop_px > image_size_px:
            raise ValueError(f"objective.crop_px: {self.crop_px} is larger than data.image_size_px {image_size_px}")


NUM_NOISE_LEVELS: Final = 1000
"""Of MSDM."""


class MsdmSettings(OfObjective):
    """MSDM from scratch: diffusers' UNet2DConditionModel with cross-attention to a clinical text encoder's states.

    It sees the latents of a model folder that a run of `msdm_vae` has left. Sizes, noise and null fraction as in the
    released code; the mask as a condition is ours.
    """

    trains = "network"
    sees = "latents"
    model_kinds = ("msdm",)
    has_noise_levels = True
    adds_noise = True
    kind: Literal["msdm"] = "msdm"
    channels: tuple[int, ...] = Field((256, 256, 512, 1024), min_length=2, max_length=6)
    """Of the levels, each half as large as the one before."""
    layers_per_block: int = Field(2, ge=1)
    norm_groups: int = Field(32, ge=1)
    num_attention_levels: int = Field(4, ge=0)
    """The deepest levels attend to the text; the middle block always does."""
    heads: int = Field(8, ge=1)
    """Of attention, in every level."""
    cross_attention_dim: int = Field(1024, ge=1)
    """Width to which the text encoder's states are projected."""
    dropout: float = Field(0.1, ge=0, lt=1)
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    """Of noise, as in the released code, or of velocity, which learns nerves in far fewer steps (ours)."""
    loss: Literal["l1", "l2"] = "l1"
    beta_start: float = Field(0.002, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    """Of 1000 noise levels; the square roots of beta are evenly spaced between both (scaled_linear)."""
    null_fraction: float = Field(0.2, ge=0, lt=1)
    """Of training samples whose prompt is dropped, so that there is something to guide away from."""
    mask_condition: bool = True
    """Give latents of the nerve mask beside the noisy ones; if not, the prompt is all that images follow."""

    @property
    def sees_mask(self) -> bool:
        """See :attr:`OfObjective.sees_mask`."""
        return self.mask_condition

    @model_validator(mode="after")
    def _channels_fit_norms_and_heads(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not divide into {self.norm_groups} groups")
        attending = self.channels[-max(self.num_attention_levels, 1) :]  # the middle block always attends
        if bad := [count for count in attending if count % self.heads]:
            raise ValueError(f"heads: {bad[0]} channels do not divide into {self.heads} heads")
        if self.beta_start > self.beta_end:
            raise ValueError(f"beta_start {self.beta_start:g} must not be above beta_end {self.beta_end:g}")
        return self
