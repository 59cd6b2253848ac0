"""Objectives that train adapters on a frozen model."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ccmdist.config.objectives.objective import AdapterName, OfObjective


class EditSettings(OfObjective):
    """An adapter on a frozen model that edits images; its settings are `adapter`, `base` and the fields beside them."""

    trains = "adapter"
    sees = "latents"
    model_kinds = ("qwen", "flux", "flux_control", "kandinsky5")
    has_noise_levels = True
    kind: Literal["edit"] = "edit"


class DualSettings(OfObjective):
    """Two adapters on one frozen model (Dual-LoRA): one draws whole images, one fills holes in them.

    What a step trains is a function of the seed and its number. Fraction and weights are ours: the paper's were not
    found.
    """

    trains = "adapter"
    sees = "latents"
    model_kinds = EditSettings.model_kinds
    has_noise_levels = True
    kind: Literal["dual"] = "dual"
    adapters: tuple[AdapterName, ...] = ("synthesis", "completion")
    """Which are trained: both in turn, or one alone."""
    completion_fraction: float = Field(0.5, gt=0, lt=1)
    """Of the steps, where both are trained: that of the completion adapter."""
    min_snr_gamma: float | None = Field(5.0, gt=0)
    """Bound of the weights of noise levels, carried over to the flow; None for equal weights. Min-SNR's own default."""
    layout_weight: float = Field(1.0, ge=0)
    """How much more a token on the structure counts than one beside it: stands for the paper's layout regulariser."""

    @property
    def num_adapters(self) -> int:
        """See :class:`OfObjective`."""
        return len(self.adapters)

    @property
    def completion_share(self) -> float:
        """See :class:`OfObjective`."""
        return self.completion_fraction if self.num_adapters > 1 else float("completion" in self.adapters)

    @model_validator(mode="after")
    def _adapters_are_distinct(self) -> Self:
        if not self.adapters or len(set(self.adapters)) < len(self.adapters):
            raise ValueError(
                f"objective.adapters: {list(self.adapters)} must name synthesis, completion or both, each once"
            )
        return self
