"""What objectives are called, and what all of the project needs to know of each."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from ccmdist.config.settings import Settings

ObjectiveKind = Literal["edit", "dual", "spade", "maisi", "msdm_vae", "msdm", "segment", "diagnose"]
AdapterName = Literal["synthesis", "completion"]
"""What an adapter of `dual` does: draw whole images, or fill holes in images."""
NetworkKind = Literal["spade", "maisi", "msdm_vae", "msdm", "segment", "diagnose"]
"""Objectives that train a network of their own from scratch, instead of an adapter on a frozen model."""

ModelKind = Literal["qwen", "msdm", "flux", "flux_control", "kandinsky5"]
"""Of model folders, and so of encoders and of what draws with them."""


class OfObjective(Settings):
    """What all of the project needs to know of an objective, told here alone."""

    trains: ClassVar[Literal["adapter", "network"]]
    """An adapter on a frozen model, or a network of its own."""
    sees: ClassVar[Literal["latents", "pixels"]]
    """Latents, with the cache and the model folder that they come from; or the pixels of the shards."""
    model_kinds: ClassVar[tuple[ModelKind, ...]] = ("qwen",)
    """Of model folders that will do, where latents are seen."""
    has_noise_levels: ClassVar[bool]
    """Whether images are drawn in denoise steps, with guidance; or in one pass."""
    adds_noise: ClassVar[bool] = False
    """Whether noise may be added anew at each denoise step."""
    draws: ClassVar[bool] = True
    """Whether what is trained draws images of masks and prompts."""
    serves: ClassVar[str] = ""
    """If it does not: what it is for."""

    made_by: ClassVar[Mapping[str, str]] = {}
    """Of the local files that settings name, those that a command here makes: setting -> how."""

    @property
    def num_adapters(self) -> int:
        """That are trained on a frozen model, in turn if there are several."""
        return 1

    @property
    def sees_mask(self) -> bool:
        """Whether the images that it draws follow their masks, and not their prompts alone."""
        return True

    @property
    def completion_share(self) -> float:
        """Of the optimizer steps, that of those which train to fill holes."""
        return 0.0

    @property
    def files(self) -> Mapping[str, Path]:
        """Setting -> the local file or folder that it names, read besides data and model."""
        return {}

    def refuse_size(self, image_size_px: int) -> None:
        """Refuse images that its networks cannot halve as often as they do.

        Raises:
            ValueError: For images of this edge.
        """
