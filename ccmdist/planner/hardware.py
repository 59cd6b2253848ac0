"""GPUs and what lies between them: figures of vendors with their source, and assumptions that say so."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from ccmdist.errors import ConfigError

T = TypeVar("T")

GB: Final = 1e9
PCIE4_BYTES_PER_S: Final = 20e9
"""That a GPU sends and receives in collectives over PCIe 4.0 x16, 31.5 GB/s by its standard. Assumed."""
NVLINK_SHARE: Final = 0.8
"""Of NVLink's rate that collectives reach. Assumed."""
NETWORK_SHARE: Final = 0.9
"""Of a node's network rate that collectives reach. Assumed."""
FILE_SYSTEM_BYTES_PER_S: Final = 5e9
"""That a node reads from the shared file system. Assumed."""
EFFICIENCY: Final = 0.4
"""Of the peak that a training step reaches. Assumed; NeMo Automodel publishes 41-43 % for LoRA of 7-8 B language models
on one H100, and 30 % for 32 B on eight (its performance summary)."""
HBM_SHARE: Final = 0.6
"""Of the memory's bandwidth that kernels reach which are bound by it. Assumed."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory_bytes: As sold; what CUDA reports is a little more (80 GB: 85.0e9 on an H100) or equal.
        flops_per_s: Dense bf16 with fp32 accumulation.
        hbm_bytes_per_s: Bandwidth of its memory.
        nvlink_bytes_per_s: In one direction; 0 without NVLink.
        source: Where the figures are from.
    """

    memory_bytes: float
    flops_per_s: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    source: str


@dataclass(frozen=True)
class Fabric:
    """What lies between the GPUs.

    Attributes:
        gpus_per_node: Unless said otherwise.
        has_nvlink: Between the GPUs of a node; else PCIe 4.0.
        node_bytes_per_s: Of all network adapters of a node together, in one direction.
        meaning: In words.
    """

    gpus_per_node: int
    has_nvlink: bool
    node_bytes_per_s: float
    meaning: str


GPUS: Final[Mapping[str, Gpu]] = {
    "h100": Gpu(80 * GB, 989.4e12, 3.35e12, 450e9, "NVIDIA H100 data sheet, SXM5"),
    "h100-pcie": Gpu(80 * GB, 756e12, 2.0e12, 0, "NVIDIA H100 data sheet, PCIe"),
    "h200": Gpu(141 * GB, 989.4e12, 4.8e12, 450e9, "NVIDIA H200 data sheet, SXM"),
    "b200": Gpu(180 * GB, 2250e12, 8.0e12, 900e9, "NVIDIA DGX B200 data sheet, an eighth of it"),
    "a100": Gpu(80 * GB, 312e12, 2.039e12, 300e9, "NVIDIA A100 data sheet, SXM4 80 GB"),
    "a100-40": Gpu(40 * GB, 312e12, 1.555e12, 300e9, "NVIDIA A100 data sheet, SXM4 40 GB"),
    "l40s": Gpu(48 * GB, 362e12, 0.864e12, 0, "NVIDIA L40S data sheet"),
    "a40": Gpu(48 * GB, 149.7e12, 0.696e12, 0, "NVIDIA A40 data sheet"),
    "a6000": Gpu(48 * GB, 154.8e12, 0.768e12, 0, "NVIDIA RTX A6000 and GA102 white paper"),
    "rtx4090": Gpu(24 * GB, 165.2e12, 1.008e12, 0, "NVIDIA Ada white paper, fp32 accumulation"),
}

FABRICS: Final[Mapping[str, Fabric]] = {
    "nvlink-8x400g": Fabric(8, True, 8 * 50e9, "NVLink in a node, eight 400 Gbit/s adapters between nodes"),
    "nvlink-2x200g": Fabric(8, True, 2 * 25e9, "NVLink in a node, two 200 Gbit/s adapters between nodes"),
    "nvlink4-1x200g": Fabric(4, True, 25e9, "NVLink in a node of 4 GPUs, one 200 Gbit/s adapter between nodes"),
    "pcie-1x200g": Fabric(8, False, 25e9, "PCIe 4.0 in a node, one 200 Gbit/s adapter between nodes"),
    "pcie-1x100g": Fabric(4, False, 12.5e9, "PCIe 4.0 in a node of 4 GPUs, one 100 Gbit/s adapter between nodes"),
}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name, with an error that names the nearest if there is none."""
    return _named(GPUS, name, "GPU")


def fabric_named(name: str) -> Fabric:
    """The fabric of this name, with an error that names the nearest if there is none."""
    return _named(FABRICS, name, "fabric")


def _named(table: Mapping[str, T], name: str, what: str) -> T:
    if name in table:
        return table[name]
    close = difflib.get_close_matches(name.lower(), table, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"choose of {', '.join(table)}"
    raise ConfigError(f"--{what.lower()}: '{name}' is no {what} that is known here", hint)


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run.

    Attributes:
        gpu: Name of their kind.
        fabric: Name of what lies between them.
        num_gpus: That train together.
        gpus_per_node: How many of them share a node.
        efficiency: Of the peak that a training step reaches; assumed.
        file_system_bytes_per_s: That a node reads; assumed.
    """

    gpu: str
    fabric: str
    num_gpus: int
    gpus_per_node: int
    efficiency: float = EFFICIENCY
    file_system_bytes_per_s: float = FILE_SYSTEM_BYTES_PER_S

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            ConfigError: If names are unknown, numbers do not fit, or the GPU has no NVLink.
        """
        gpu, fabric = gpu_named(self.gpu), fabric_named(self.fabric)
        if fabric.has_nvlink and not gpu.nvlink_bytes_per_s:
            others = [name for name, other in FABRICS.items() if not other.has_nvlink]
            raise ConfigError(
                f"--fabric {self.fabric}: {self.gpu} has no NVLink", f"choose of {', '.join(others)}, or another --gpu"
            )
        if self.num_gpus % self.gpus_per_node:
            raise ConfigError(
                f"--gpus {self.num_gpus}: is no multiple of the {self.gpus_per_node} GPUs of a node",
                "give --gpus-per-node, or take whole nodes",
            )

    @property
    def num_nodes(self) -> int:
        """Nodes of the run."""
        return self.num_gpus // self.gpus_per_node

    @property
    def link_bytes_per_s(self) -> float:
        """That each GPU receives in collectives inside a node."""
        nvlink = NVLINK_SHARE * gpu_named(self.gpu).nvlink_bytes_per_s
        return nvlink if fabric_named(self.fabric).has_nvlink else PCIE4_BYTES_PER_S

    def bytes_per_s(self, num_ranks: int) -> float:
        """That each GPU receives in a ring over ``num_ranks`` GPUs: a ring over several nodes enters each node once.

        So all that a GPU receives passes its node's network adapters once, whatever the number of GPUs of the node.
        """
        if num_ranks <= self.gpus_per_node:
            return self.link_bytes_per_s
        return min(self.link_bytes_per_s, NETWORK_SHARE * fabric_named(self.fabric).node_bytes_per_s)
