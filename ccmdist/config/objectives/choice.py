"""All objectives as one type: a tagged union whose tag, `kind`, is also the name of a baseline."""

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from ccmdist.config.objectives.adapters import DualSettings, EditSettings
from ccmdist.config.objectives.baselines import MaisiSettings, SpadeSettings
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings, SegmentSettings
from ccmdist.config.objectives.msdm import MsdmSettings, MsdmVaeSettings


def objective_kind(values: Any) -> str:
    """The tag of settings that are not validated yet; `edit` where none is given."""
    kind = values.get("kind", "edit") if isinstance(values, dict) else getattr(values, "kind", "edit")
    return str(kind)


ObjectiveSettings = Annotated[
    Annotated[EditSettings, Tag("edit")]
    | Annotated[DualSettings, Tag("dual")]
    | Annotated[SpadeSettings, Tag("spade")]
    | Annotated[MaisiSettings, Tag("maisi")]
    | Annotated[MsdmVaeSettings, Tag("msdm_vae")]
    | Annotated[MsdmSettings, Tag("msdm")]
    | Annotated[SegmentSettings, Tag("segment")]
    | Annotated[DiagnoseSettings, Tag("diagnose")],
    Discriminator(objective_kind),
]
