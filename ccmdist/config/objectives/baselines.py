"""Networks from scratch that others are compared with."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ccmdist.config.data import PX_PER_TOKEN
from ccmdist.config.objectives.objective import OfObjective


class SpadeSettings(OfObjective):
    """A SPADE GAN from scratch: MONAI's generator and patch discriminators, on pixels. The sizes are ours."""

    trains = "network"
    sees = "pixels"
    has_noise_levels = False
    kind: Literal["spade"] = "spade"
    channels: tuple[int, ...] = Field((256, 256, 128, 64, 32), min_length=2, max_length=8)
    """Of the generator's blocks, each of which doubles the size of the image."""
    norm_channels: int = Field(64, ge=1)
    """Hidden channels of each spatially adaptive normalisation."""
    noise_dim: int = Field(128, ge=1)
    """Length of the noise from which an image is drawn: one mask has many images."""
    discriminator_channels: int = Field(32, ge=1)
    discriminator_layers: int = Field(2, ge=1)
    """Of the first; the next has twice as many, and MONAI doubles the channels with each layer."""
    num_discriminators: int = Field(2, ge=1, le=4)
    feature_matching: float = Field(10.0, ge=0)
    """Weight of the distance between real and drawn images in the discriminators' features."""

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        if image_size_px % (factor := 2 ** len(self.channels)) or image_size_px // factor < 2:
            raise ValueError(
                f"objective.channels: {len(self.channels)} blocks double the image {len(self.channels)} times, and "
                f"data.image_size_px {image_size_px} is not {factor} times 2 or more"
            )
        layers = self.discriminator_layers * self.num_discriminators
        if image_size_px < (smallest := 4 * 2**layers):
            raise ValueError(
                f"objective.discriminator_layers: the last discriminator has {layers} layers, which need images of "
                f"{smallest} px (data.image_size_px {image_size_px})"
            )


class MaisiSettings(OfObjective):
    """A MAISI-style latent diffusion from scratch: MONAI's U-Net, on the cached latents. Sizes as of MAISI's own."""

    trains = "network"
    sees = "latents"
    has_noise_levels = True
    kind: Literal["maisi"] = "maisi"
    channels: tuple[int, ...] = Field((64, 128, 256, 512), min_length=1, max_length=6)
    """Of the levels of the U-Net, each half as large as the one before."""
    num_res_blocks: int = Field(2, ge=1)
    norm_groups: int = Field(32, ge=1)
    """Channels are normed in so many groups, of two or more: noise level, clinical group and size of a pixel are added
    to channels as constants, which a norm over a single channel would take away again."""
    num_attention_levels: int = Field(2, ge=0)
    """The deepest levels attend."""
    head_channels: int = Field(32, ge=1)
    null_fraction: float = Field(0.1, ge=0, lt=1)
    """Of training samples whose clinical group is withheld, so that there is something to guide away from. Ours."""

    @model_validator(mode="after")
    def _channels_fit_norms_and_heads(self) -> Self:
        if bad := [count for count in self.channels if count % self.norm_groups or count == self.norm_groups]:
            raise ValueError(f"norm_groups: {bad[0]} channels do not make {self.norm_groups} groups of two or more")
        attending = self.channels[-max(self.num_attention_levels, 1) :]  # the middle block always attends
        if bad := [count for count in attending if count % self.head_channels]:
            raise ValueError(f"head_channels: {bad[0]} channels do not divide into heads of {self.head_channels}")
        return self

    def refuse_size(self, image_size_px: int) -> None:
        """See :meth:`OfObjective.refuse_size`."""
        num_halvings, latent_px = len(self.channels) - 1, 2 * (image_size_px // PX_PER_TOKEN)
        if latent_px % (factor := 2**num_halvings):
            raise ValueError(
                f"objective.channels: {len(self.channels)} levels halve latents of {latent_px} {num_halvings} times, "
                f"which {factor} does not divide; use fewer levels, or another data.image_size_px"
            )
