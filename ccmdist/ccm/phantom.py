"""Procedural CCM frames with an exact nerve mask and constructed biomarkers: for tests, demos, privacy-safe masks.

Not realistic CCM, and the clinical groups differ by construction: nothing clinical follows from a phantom. It is
no reference for a Frechet distance, and no evidence that groups can be told apart.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator, default_rng
from numpy.typing import NDArray

from ccmdist.ccm.groups import CLINICAL_GROUPS, ClinicalGroup
from ccmdist.ccm.phantom_defaults import GROUP_DEFAULTS
from ccmdist.ccm.phantom_lanes import Floats, Frame
from ccmdist.ccm.phantom_nerves import Nerves, drawn, grown
from ccmdist.ccm.phantom_optics import shown
from ccmdist.ccm.structure import BRANCH_POINT, DENDRITIC_CELL, END_POINT, mark_points
from ccmdist.ccm.units import UM_PER_PX_HRT3

Part = Literal["nerves", "optics"]

__all__ = ["Nerves", "Phantom", "make_nerves", "make_phantom"]


@dataclass(frozen=True)
class Phantom:
    """One procedural frame."""

    image: NDArray[np.uint8]
    """(H, W), 8-bit grey."""
    nerve_mask: NDArray[np.bool_]
    """(H, W), see :class:`~ccmdist.ccm.phantom_nerves.Nerves`."""
    centreline: NDArray[np.bool_]
    """(H, W)."""
    labels: dict[str, float]
    """Constructed biomarkers cnfd, cnbd, cnfl, cnfa, as in :class:`~ccmdist.ccm.phantom_nerves.Nerves`."""
    points: NDArray[np.uint8]
    """(H, W), codes of :mod:`ccmdist.ccm.structure`: branch points and ends as constructed, and dendritic cells."""


def make_phantom(
    clinical_group: ClinicalGroup, seed: int, size_px: int = 384, um_per_px: float = UM_PER_PX_HRT3
) -> Phantom:
    """A phantom frame; the same arguments give the same bytes.

    Args:
        clinical_group: Decides the averages, see :class:`~ccmdist.ccm.phantom_defaults.GroupDefaults`.
        seed: Not negative; each seed is another frame.
        size_px: Edge of the square frame. A smaller frame is a smaller field of view with nerves of native width;
            the expected number of trunks goes with its edge, which they cross, and all other counts with its area.
        um_per_px: Edge of a pixel in micrometres.
    """
    nerves = make_nerves(clinical_group, seed, size_px, um_per_px)
    rng = _generator(clinical_group, seed, size_px, "optics")
    frame = Frame(size_px, um_per_px)
    image, cells_um = shown(nerves.fibres, GROUP_DEFAULTS[clinical_group], frame, rng)
    points = _points(nerves, cells_um, frame)
    return Phantom(image, nerves.nerve_mask, nerves.centreline, nerves.labels, points)


def make_nerves(
    clinical_group: ClinicalGroup, seed: int, size_px: int = 384, um_per_px: float = UM_PER_PX_HRT3
) -> Nerves:
    """Geometry, mask and labels of :func:`make_phantom` with the same arguments, without the image."""
    frame = Frame(size_px, um_per_px)
    rng = _generator(clinical_group, seed, size_px, "nerves")
    return drawn(grown(GROUP_DEFAULTS[clinical_group], frame, rng), frame)


def _points(nerves: Nerves, cells_um: Floats, frame: Frame) -> NDArray[np.uint8]:
    points = np.zeros((frame.size_px, frame.size_px), np.uint8)
    by_code = {
        END_POINT: np.concatenate([np.empty((0, 2)), *(fibre.end_points_um for fibre in nerves.fibres)]),
        BRANCH_POINT: np.concatenate([np.empty((0, 2)), *(fibre.branch_points_um for fibre in nerves.fibres)]),
        DENDRITIC_CELL: cells_um,
    }
    for code, places_um in by_code.items():
        mark_points(points, frame.pixels(places_um[frame.holds(places_um)]), code)
    return points


def _generator(clinical_group: ClinicalGroup, seed: int, size_px: int, part: Part) -> Generator:
    return default_rng([seed, size_px, CLINICAL_GROUPS.index(clinical_group), int(part == "optics")])
