"""The weights of a network that was trained from scratch, as values and as files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ccmdist.commit import committed_file
from ccmdist.config.objectives import MaisiSettings, SpadeSettings
from ccmdist.errors import ModelError
from ccmdist.models.maisi import make_maisi
from ccmdist.models.network_folder import NETWORK_FILE, REMEDY, NetworkAbout, read_about, write_about
from ccmdist.models.spade import make_generator


@dataclass(frozen=True)
class NetworkState:
    """A trained network that draws images: of SPADE the generator, of MAISI the U-Net.

    Attributes:
        about: Its description.
        tensors: Parameter name -> values, fp32, on the CPU.
    """

    about: NetworkAbout
    tensors: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        settings: SpadeSettings | MaisiSettings,
        image_size_px: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, str],
    ) -> "NetworkState":
        """The state of these weights, its digest computed."""
        digest = _digest(settings, image_size_px, tensors)
        about = NetworkAbout(settings=settings, image_size_px=image_size_px, facts=dict(facts), digest=digest)
        return cls(about, tensors)

    def network(self, device: torch.device) -> nn.Module:
        """The network, ready to draw.

        Raises:
            ModelError: If the weights are not those of its settings.
        """
        network = make_network(self.about.settings, self.about.image_size_px, 0)
        try:
            network.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            problem = str(error).splitlines()[-1].strip()
            raise ModelError(
                f"network {self.about.digest[:12]}: does not fit its settings ({problem})", REMEDY
            ) from None
        return network.requires_grad_(False).eval().to(device)


def make_network(settings: SpadeSettings | MaisiSettings, image_size_px: int, seed: int) -> nn.Module:
    """The network of a kind that draws images, with weights that depend on the seed alone."""
    if isinstance(settings, SpadeSettings):
        return make_generator(settings, image_size_px, seed)
    return make_maisi(settings, seed)


def write_network(folder: Path, state: NetworkState) -> None:
    """Write a network as a folder; each file appears complete or not at all."""
    tensors = {name: tensor.float().contiguous() for name, tensor in state.tensors.items()}
    with committed_file(folder / NETWORK_FILE) as temporary:
        save_file(tensors, temporary)
    write_about(folder, state.about)


def read_network(folder: Path) -> NetworkState:
    """The network that :func:`write_network` wrote to ``folder``.

    Raises:
        ModelError: If a file is missing, cut short, not one of ours, or not the one that the description names.
    """
    about, file = read_about(folder), folder / NETWORK_FILE
    if not file.is_file():
        raise ModelError(f"{file}: is missing", REMEDY)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file}: is not a complete safetensors file ({error})", REMEDY) from None
    if (found := _digest(about.settings, about.image_size_px, tensors)) != about.digest:
        raise ModelError(f"{file}: is {found[:12]}, its description names {about.digest[:12]}", REMEDY)
    return NetworkState(about, tensors)


def _digest(settings: SpadeSettings | MaisiSettings, image_size_px: int, tensors: Mapping[str, Tensor]) -> str:
    said = {"settings": settings.model_dump(mode="json"), "image_size_px": image_size_px}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
