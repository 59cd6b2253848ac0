"""What differs between kinds of networks that are trained from scratch, as modules and as files: the one table.

Most are one file of weights in FOLDER/network.safetensors; MSDM is a folder that stock diffusers opens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ccmdist.commit import committed_file
from ccmdist.config.objectives.msdm import MsdmSettings, MsdmVaeSettings
from ccmdist.config.objectives.objective import NetworkKind
from ccmdist.errors import ModelError
from ccmdist.models import maisi, msdm, msdm_unet, spade, unet
from ccmdist.models.network_folder import NETWORK_FILE, REMEDY, NetworkAbout


@dataclass(frozen=True)
class NetworkSpec:
    """A kind of network.

    Attributes:
        build: (settings, image_size_px, tensors, seed) -> the network, on the CPU. Without tensors its weights depend
            on the seed alone; with them, it is one that they fit: what its settings leave open stands in their shapes.
            None where an adapter is in it, of which nothing is known here: see :mod:`ccmdist.train.mdf_network`.
        write: (folder, about, tensors, parts): all files but the description.
        weights: Where in the folder they lie.
        prefix: Of the names, in a checkpoint, of those parameters that are kept.
        encoders_digest: Of the identity of a model folder's encoders, for a network that sees their latents: what it
            was trained beside, and draws with.
    """

    build: Callable[[Any, int, Mapping[str, Tensor] | None, int], nn.Module] | None
    write: Callable[[Path, NetworkAbout, Mapping[str, Tensor], Path | None], None]
    weights: str = NETWORK_FILE
    prefix: str = ""
    encoders_digest: Callable[[Mapping[str, Any]], str] | None = None


def write_file(folder: Path, about: NetworkAbout, tensors: Mapping[str, Tensor], parts: Path | None) -> None:
    """Write weights as one file."""
    with committed_file(folder / NETWORK_FILE) as temporary:
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary)


def read_file(file: Path) -> dict[str, Tensor]:
    """The weights in a file.

    Raises:
        ModelError: If it is missing or cut short.
    """
    if not file.is_file():
        raise ModelError(f"{file}: is missing", REMEDY)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file}: is not a complete safetensors file ({error})", REMEDY) from None


def loaded(network: nn.Module, tensors: Mapping[str, Tensor], about: NetworkAbout) -> nn.Module:
    """``network`` with these weights.

    Raises:
        ModelError: If they are not those of such a network.
    """
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise ModelError(f"network {about.digest[:12]}: does not fit its settings ({problem})", REMEDY) from None
    return network


def _build_unet(settings: Any, image_size_px: int, tensors: Mapping[str, Tensor] | None, seed: int) -> nn.Module:
    assert tensors is not None, "widths of latents and text stand in the weights alone"
    try:
        ends = msdm_unet.Ends.of(tensors)
    except KeyError as error:
        raise ModelError(f"network: does not fit its settings (missing {error})", REMEDY) from None
    return msdm_unet.make_unet(settings, ends, seed)


def _write_pipeline(folder: Path, about: NetworkAbout, tensors: Mapping[str, Tensor], parts: Path | None) -> None:
    settings = about.settings
    assert isinstance(settings, MsdmSettings), about.kind
    assert parts is not None, "an MSDM is written with the encoders that it was trained beside"
    unet = loaded(_build_unet(settings, about.image_size_px, tensors, 0), tensors, about)
    msdm_unet.write_pipeline(folder, settings, about.image_size_px, unet, parts)


def _write_encoders(folder: Path, about: NetworkAbout, tensors: Mapping[str, Tensor], parts: Path | None) -> None:
    assert isinstance(about.settings, MsdmVaeSettings), about.kind
    msdm.write_encoders(folder, about.settings, about.facts, tensors)


NETWORKS: Final[Mapping[NetworkKind, NetworkSpec]] = {
    "spade": NetworkSpec(
        build=lambda settings, size_px, _, seed: spade.make_generator(settings, size_px, seed),
        write=write_file,
        prefix=f"{spade.GENERATOR}.",
    ),
    "maisi": NetworkSpec(
        build=lambda settings, size_px, _, seed: maisi.make_maisi(settings, seed),
        write=write_file,
        encoders_digest=maisi.latents_digest,
    ),
    "msdm_vae": NetworkSpec(
        build=lambda settings, _, __, seed: msdm.make_vae(settings, seed),
        write=_write_encoders,
        weights=msdm.VAE_WEIGHTS,
    ),
    "msdm": NetworkSpec(
        build=_build_unet,
        write=_write_pipeline,
        weights=msdm_unet.WEIGHTS,
        encoders_digest=msdm_unet.encoders_digest,
    ),
    "segment": NetworkSpec(build=lambda settings, _, __, seed: unet.make_unet(settings, seed), write=write_file),
    "diagnose": NetworkSpec(build=None, write=write_file),
}
