"""A network that was trained from scratch, as a folder: what its description says; imports no torch.

FOLDER/
  network.json         kind, settings, facts, and the digest of all that decides what it draws
  network.safetensors  its weights, fp32; of an MSDM they lie in a folder that stock diffusers opens, with all around it
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ccmdist.commit import commit_json
from ccmdist.config.objectives.baselines import MaisiSettings, SpadeSettings
from ccmdist.config.objectives.mdf_mllm import DiagnoseSettings, SegmentSettings
from ccmdist.config.objectives.msdm import MsdmSettings, MsdmVaeSettings
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.errors import OF_THE_MACHINE, ModelError

ABOUT_FILE: Final = "network.json"
NETWORK_FILE: Final = "network.safetensors"
REMEDY: Final = "give the folder `network` of a finished run, the run itself, or one of its checkpoints"
NetworkSettings = Annotated[
    SpadeSettings | MaisiSettings | MsdmVaeSettings | MsdmSettings | SegmentSettings | DiagnoseSettings,
    Field(discriminator="kind"),
]


class NetworkAbout(BaseModel):
    """The description of a network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["ccmdist network"] = "ccmdist network"
    format_version: Literal[1] = 1
    settings: NetworkSettings
    image_size_px: int
    """Edge of the images that it was trained on, and draws."""
    facts: Mapping[str, str]
    """Where it comes from: "training_set_digest", "training_split", "base_digest", "step" and so on."""
    digest: str
    """Of settings, size and weights."""

    @property
    def kind(self) -> NetworkKind:
        """Which objective trained it."""
        return self.settings.kind


def write_about(folder: Path, about: NetworkAbout) -> None:
    """Write the description; after the weights, for it makes the folder a network."""
    commit_json(folder / ABOUT_FILE, about.model_dump(mode="json"))


def read_about(folder: Path) -> NetworkAbout:
    """The description of the network in ``folder``.

    Raises:
        ModelError: If there is none, or it is not one of ours.
    """
    path = folder / ABOUT_FILE
    try:
        values: Any = json.loads(path.read_bytes())
        return NetworkAbout.model_validate(values)
    except OSError as error:
        if error.errno in OF_THE_MACHINE:
            raise
        raise ModelError(f"{path}: {error.strerror}", REMEDY) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise ModelError(f"{path}: is not the description of a network ({where}: {first['msg']})", REMEDY) from None
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read ({error})", REMEDY) from None
