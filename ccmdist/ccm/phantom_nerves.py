"""Nerves of a phantom: the fibres, the exact mask of them, and the biomarkers that they were built to have."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.random import Generator

from ccmdist.ccm.phantom_defaults import GroupDefaults
from ccmdist.ccm.phantom_lanes import (
    STEP_UM,
    Bools,
    Floats,
    Frame,
    Lanes,
    kinked_noise,
    resampled,
    smooth_noise,
)

FibreKind = Literal["main", "trunk", "fork", "connection", "loop", "thin"]
HRT3_EDGE_MM = 0.4
MIN_BRANCH_UM = 30
MAX_BRANCH_UM = 260


@dataclass(frozen=True)
class Fibre:
    """One nerve fibre."""

    path_um: Floats
    """Points (K, 2) as (y, x), STEP_UM apart; may leave the frame."""
    kind: FibreKind
    """main and trunk cross the frame, a trunk over less than half its edge; a fork leaves one of them, a
    connection joins two, a loop comes back to its own; a thin fibre touches none."""
    fwhm_um: float
    contrast: float
    num_junctions: int = 0
    """Ends of it that lie on a main nerve, inside the frame."""

    @property
    def branch_points_um(self) -> Floats:
        """Where it leaves or joins a trunk, (K, 2); crossings of other fibres do not count."""
        return self.path_um[{"fork": [0], "connection": [0, -1], "loop": [0, -1]}.get(self.kind, [])]

    @property
    def end_points_um(self) -> Floats:
        """Where it ends in the tissue, (K, 2)."""
        return self.path_um[{"fork": [-1], "thin": [0, -1]}.get(self.kind, [])]


@dataclass(frozen=True)
class Nerves:
    """Geometry of one phantom."""

    fibres: tuple[Fibre, ...]
    nerve_mask: Bools
    """(H, W): pixels whose centre lies within half a fibre's width, at least 1 px, of the middle of a fibre."""
    centreline: Bools
    """(H, W): pixels that the middle of a fibre passes through."""
    labels: dict[str, float]
    """Constructed biomarkers of what lies inside the frame, per its area.

    cnfd: main nerves per mm2, a main nerve being a trunk of more than half the frame's edge in length.
    cnbd: ends of forks, connections and loops on main nerves per mm2; crossings of other fibres do not count.
    cnfl: length of the middle lines of all fibres in mm per mm2, along the curve and not along pixels.
    cnfa: area of the mask in mm2 per mm2.
    """


def grown(defaults: GroupDefaults, frame: Frame, rng: Generator) -> tuple[Fibre, ...]:
    """The fibres of one phantom: trunks, then branches, then thin fibres until the wanted length is reached."""
    cnfd, cnbd, cnfl = (max(0.0, rng.normal(*wanted)) for wanted in (defaults.cnfd, defaults.cnbd, defaults.cnfl))
    # A trunk crosses the whole field of view: their number grows with its edge, and all else with its area.
    num_trunks = _rounded(cnfd * HRT3_EDGE_MM * frame.edge_um / 1000, rng)
    lanes = Lanes(frame, num_trunks, defaults.wander_um, rng)
    trunks = {lane: _trunk(lanes, lane, defaults) for lane in range(lanes.first, lanes.last + 1)}
    trunks = {lane: trunk for lane, trunk in trunks.items() if frame.holds(lanes.trunk(lane)).any()}
    fibres = list(trunks.values())
    missing_mm = cnfl * frame.area_mm2 - sum(frame.length_mm(fibre.path_um) for fibre in fibres)
    missing_junctions = _rounded(cnbd * frame.area_mm2, rng) if trunks else 0
    while missing_junctions > 0:
        length_um = float(np.clip(1000 * missing_mm / missing_junctions, MIN_BRANCH_UM, MAX_BRANCH_UM))
        fibres.append(_branch(lanes, trunks, length_um))
        missing_mm -= frame.length_mm(fibres[-1].path_um)
        missing_junctions -= max(fibres[-1].num_junctions, 1)
    while missing_mm > 0.1 * frame.area_mm2:
        fibres.append(_thin(lanes, min(1000 * missing_mm, rng.uniform(50, 220)), defaults))
        missing_mm -= frame.length_mm(fibres[-1].path_um)
    return tuple(fibres)


def _rounded(value: float, rng: Generator) -> int:
    """One of the two neighbouring integers, drawn so that its expectation is ``value``."""
    return int(np.floor(value) + (rng.random() < value % 1))


def _trunk(lanes: Lanes, lane: int, defaults: GroupDefaults) -> Fibre:
    path_um = resampled(lanes.trunk(lane))
    is_main = lanes.frame.length_mm(path_um) > lanes.frame.edge_um / 2000
    # Thick trunks are the bright ones.
    size = lanes.rng.normal()
    fwhm_um, contrast = defaults.fwhm_um * np.exp(0.18 * size), defaults.contrast * np.exp(0.35 * size)
    return Fibre(path_um, "main" if is_main else "trunk", float(fwhm_um), float(contrast))


def _branch(lanes: Lanes, trunks: dict[int, Fibre], length_um: float) -> Fibre:
    """A fibre that leaves a trunk at a sharp angle, and ends in its lane, on the next trunk or on the same one."""
    rng = lanes.rng
    lane = int(rng.choice(list(trunks)))
    side = int(rng.choice([-1, 1]))
    start = int(rng.choice(np.flatnonzero(lanes.frame.holds(lanes.trunk(lane)))))
    gap_um = lanes.gap_um(lane, side, start)
    angle = rng.uniform(0.35, 1.0)
    kind: FibreKind = "fork"
    if lane + side in trunks and gap_um / np.sin(angle) < 2 * length_um and rng.random() < 0.45:
        kind, length_um = "connection", gap_um / np.sin(angle)
    elif length_um > 60 and rng.random() < 0.2:
        kind = "loop"
    else:
        length_um *= rng.lognormal(0, 0.3)
    num = max(int(length_um * np.cos(angle if kind == "connection" else angle / 2) / STEP_UM), 8)
    indices = start + int(rng.choice([-1, 1])) * np.arange(num)
    indices = indices[(indices >= 0) & (indices < len(lanes.t_um))]
    share = _share(kind, len(indices), gap_um, angle, rng)
    path_um = resampled(lanes.between(lane, side, indices, share))
    parent = trunks[lane]
    thinning = float(rng.uniform(0.35, 0.95))
    ends = [parent] if kind == "fork" else [parent, trunks[lane + side] if kind == "connection" else parent]
    on_main = [end.kind == "main" for end in ends]
    inside = lanes.frame.holds(path_um[[0, -1]])
    return Fibre(
        path_um,
        kind,
        max(parent.fwhm_um * thinning**0.3, 1.6),
        parent.contrast * thinning,
        sum(main and bool(held) for main, held in zip(on_main, inside, strict=False)),
    )


def _share(kind: FibreKind, num: int, gap_um: float, angle: float, rng: Generator) -> Floats:
    """Where a branch is between its trunk, 0, and the next one, 1, at each of ``num`` steps along the lane."""
    part = np.arange(num) / max(num - 1, 1)
    run_um = np.arange(num) * STEP_UM
    jitter = (3.0 * kinked_noise(rng, num, 20) + 1.0 * kinked_noise(rng, num, 6)) / gap_um
    if kind == "connection":
        share = part + np.sin(np.pi * part) * jitter
    elif kind == "loop":
        height = min(run_um[-1] * np.tan(angle) / 3 / gap_um, 0.6)
        share = height * np.sin(np.pi * part) ** 0.8 + np.sin(np.pi * part) * jitter
    else:
        reach = rng.uniform(0.25, 0.8)
        share = -reach * np.expm1(-run_um * np.tan(angle) / (gap_um * reach)) - np.expm1(-run_um / 15) * jitter
    # Within the lane, so that no branch crosses a trunk.
    return np.clip(share, 0, 1 if kind == "connection" else 0.95)


def _thin(lanes: Lanes, length_um: float, defaults: GroupDefaults) -> Fibre:
    """A faint fibre somewhere in the frame that wanders along its lane and begins and ends in it."""
    rng = lanes.rng
    lane, middle, share = lanes.at(rng.uniform(0, lanes.frame.edge_um, 2))
    num = max(int(length_um / STEP_UM), 8)
    indices = np.clip(middle + np.arange(num) - int(rng.integers(num)), 0, len(lanes.t_um) - 1)
    indices = np.unique(indices)
    num = len(indices)
    gap_um = max(lanes.gap_um(lane, 1, middle), 20)
    wander = 0.12 * smooth_noise(rng, num, 60) + rng.uniform(-0.7, 0.7) * np.linspace(-1, 1, num)
    wander += (5.0 * kinked_noise(rng, num, 30) + 1.2 * kinked_noise(rng, num, 7)) / gap_um
    path_um = resampled(lanes.between(lane, 1, indices, 0.5 + 0.42 * np.tanh((share - 0.5 + wander) / 0.42)))
    return Fibre(path_um, "thin", float(rng.uniform(1.5, 1.9)), float(defaults.contrast * rng.uniform(0.35, 0.7)))


def drawn(fibres: tuple[Fibre, ...], frame: Frame) -> Nerves:
    """Mask, centreline and constructed biomarkers of the fibres."""
    centreline = np.zeros((frame.size_px, frame.size_px), bool)
    nerve_mask = centreline.copy()
    for fibre in fibres:
        points_px = frame.pixels(fibre.path_um)
        _mark(centreline, points_px, 0)
        _mark(nerve_mask, points_px, max(1.0, fibre.fwhm_um / frame.um_per_px / 2))
    labels = {
        "cnfd": sum(fibre.kind == "main" for fibre in fibres) / frame.area_mm2,
        "cnbd": sum(fibre.num_junctions for fibre in fibres) / frame.area_mm2,
        "cnfl": sum(frame.length_mm(fibre.path_um) for fibre in fibres) / frame.area_mm2,
        "cnfa": float(nerve_mask.mean()),
    }
    return Nerves(fibres, nerve_mask, centreline, labels)


def _mark(canvas: Bools, points_px: Floats, radius_px: float) -> None:
    """Set the pixels whose centre is no farther than the radius from a point, and those that hold a point."""
    reach = int(np.ceil(radius_px))
    span = np.arange(-reach, reach + 1)
    offsets = np.stack(np.meshgrid(span, span, indexing="ij"), axis=-1).reshape(-1, 2)
    pixels = np.rint(points_px).astype(int)[:, None] + offsets
    near = ((pixels - points_px[:, None]) ** 2).sum(axis=2) <= radius_px**2
    near |= (offsets == 0).all(axis=1)
    near &= ((pixels >= 0) & (pixels < len(canvas))).all(axis=2)
    canvas[tuple(pixels[near].T)] = True
