"""The weights of a network that was trained from scratch, as values and as files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ccmdist.errors import ModelError
from ccmdist.models.network_folder import REMEDY, NetworkAbout, NetworkSettings, read_about, write_about
from ccmdist.models.network_kinds import NETWORKS, loaded, read_file


@dataclass(frozen=True)
class NetworkState:
    """A trained network: of SPADE the generator, of MAISI and MSDM the U-Net, of MDF-MLLM what was trained.

    Attributes:
        about: Its description.
        tensors: Parameter name -> values, fp32, on the CPU.
        parts: Folder of what it was trained beside, where its own folder holds that too.
    """

    about: NetworkAbout
    tensors: Mapping[str, Tensor]
    parts: Path | None = None

    @classmethod
    def of(
        cls,
        settings: NetworkSettings,
        image_size_px: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, str],
        parts: Path | None = None,
    ) -> "NetworkState":
        """The state of these weights, its digest computed."""
        digest = _digest(settings, image_size_px, tensors, facts)
        about = NetworkAbout(settings=settings, image_size_px=image_size_px, facts=dict(facts), digest=digest)
        return cls(about, tensors, parts)

    def network(self, device: torch.device) -> nn.Module:
        """The network, ready to draw.

        Raises:
            ModelError: If the weights are not those of its settings.
        """
        about, build = self.about, NETWORKS[self.about.kind].build
        assert build is not None, f"a network of {about.kind} is not built here"
        network = build(about.settings, about.image_size_px, self.tensors, 0)
        return loaded(network, self.tensors, about).requires_grad_(False).eval().to(device)


def make_network(settings: NetworkSettings, image_size_px: int, seed: int) -> nn.Module:
    """The network of a kind, whose settings say all of it, with weights that depend on the seed alone."""
    build = NETWORKS[settings.kind].build
    assert build is not None, f"a network of {settings.kind} is not built here"
    return build(settings, image_size_px, None, seed)


def write_network(folder: Path, state: NetworkState) -> None:
    """Write a network as a folder; each file appears complete or not at all."""
    NETWORKS[state.about.kind].write(folder, state.about, state.tensors, state.parts)
    write_about(folder, state.about)


def read_network(folder: Path) -> NetworkState:
    """The network that :func:`write_network` wrote to ``folder``.

    Raises:
        ModelError: If a file is missing, cut short, not one of ours, or not the one that the description names.
    """
    about = read_about(folder)
    tensors = read_file(file := folder / NETWORKS[about.kind].weights)
    if (found := _digest(about.settings, about.image_size_px, tensors, about.facts)) != about.digest:
        raise ModelError(f"{file}: is {found[:12]}, its description names {about.digest[:12]}", REMEDY)
    return NetworkState(about, tensors, folder)


def _digest(
    settings: NetworkSettings, image_size_px: int, tensors: Mapping[str, Tensor], facts: Mapping[str, str]
) -> str:
    """Identity of a network; what it was trained beside counts by its content, wherever it lies."""
    said = {"settings": settings.model_dump(mode="json", exclude=set(settings.files)), "image_size_px": image_size_px}
    if settings.files:
        said["base_digest"] = facts.get("base_digest", "")
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}/{tuple(tensor.shape)}/{tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
