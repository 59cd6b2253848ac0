"""The plan of a phantom: a field of view, and lanes through it whose borders are the nerve trunks.

Gaps between neighbouring trunks are log-normal and vary along the way, so trunks converge and diverge, but they
never cross. Every other fibre keeps to one lane, and so meets a trunk only where a junction is meant.
"""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from ccmdist.ccm.units import frame_area_mm2

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.int64]

STEP_UM = 0.5
"""Distance between the points of a path."""
MIN_GAP_UM = 4.0
"""Trunks that come this close run side by side."""


@dataclass(frozen=True)
class Frame:
    """A square field of view; its points are (y, x) in micrometres from the upper left corner."""

    size_px: int
    um_per_px: float

    @property
    def edge_um(self) -> float:
        """Length of an edge."""
        return self.size_px * self.um_per_px

    @property
    def area_mm2(self) -> float:
        """Area of the field of view."""
        return frame_area_mm2(self.size_px, self.size_px, self.um_per_px)

    def holds(self, points_um: Floats) -> Bools:
        """Which of the points (K, 2) lie inside the frame."""
        return np.all((points_um >= 0) & (points_um < self.edge_um), axis=1)

    def length_mm(self, path_um: Floats) -> float:
        """Length of that part of a path (K, 2) that lies inside the frame."""
        inside = self.holds((path_um[1:] + path_um[:-1]) / 2)
        return float(np.linalg.norm(np.diff(path_um, axis=0), axis=1)[inside].sum()) / 1000

    def pixels(self, points_um: Floats) -> Floats:
        """The points in pixel coordinates, in which pixel i has its centre at i."""
        return points_um / self.um_per_px - 0.5


def smooth_noise(rng: Generator, num: int, correlation_um: float) -> Floats:
    """Smooth random sequence at STEP_UM, zero mean and unit variance in expectation."""
    sigma = correlation_um / STEP_UM
    # A sequence much smoother than its steps is made coarse and stretched: far cheaper, and it looks the same.
    factor = max(int(sigma / 8), 1)
    sigma /= factor
    margin = int(4 * sigma) + 1
    num_coarse = num // factor + 2
    coarse = gaussian_filter1d(rng.standard_normal(num_coarse + 2 * margin), sigma)[margin : margin + num_coarse]
    smooth = np.interp(np.arange(num) / factor, np.arange(num_coarse), coarse)
    return smooth * np.sqrt(2 * sigma * np.sqrt(np.pi))


def kinked_noise(rng: Generator, num: int, interval_um: float) -> Floats:
    """Random polyline at STEP_UM with rounded corners every ``interval_um`` on average; about unit variance."""
    num_knots = int(2 * num * STEP_UM / interval_um) + 12
    knots_um = np.cumsum(rng.gamma(3, interval_um / 3, num_knots)) - 3 * interval_um
    line = np.interp(np.arange(num) * STEP_UM, knots_um, rng.standard_normal(num_knots))
    kinked: Floats = gaussian_filter1d(line, 0.08 * interval_um / STEP_UM, mode="nearest")
    return kinked * np.sqrt(1.5)


def resampled(path_um: Floats) -> Floats:
    """The path with points STEP_UM apart along its own length."""
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(path_um, axis=0), axis=1))])
    at = np.arange(0, along[-1] + STEP_UM / 2, STEP_UM)
    return np.stack([np.interp(at, along, path_um[:, axis]) for axis in (0, 1)], axis=1)


def _kept_apart(trunks_um: Floats) -> Floats:
    """The sideways positions (trunk, t), each at least MIN_GAP_UM beyond that of the trunk before it."""
    least_um = MIN_GAP_UM * np.arange(len(trunks_um))[:, None]
    return np.maximum.accumulate(trunks_um - least_um, axis=0) + least_um


class Lanes:
    """Trunks and the lanes between them, over the distance ``t_um`` along the main direction of the plexus.

    Trunks ``first`` to ``last`` are drawn; those beyond give every drawn one a lane on both sides.
    """

    def __init__(self, frame: Frame, num_trunks: int, wander_um: float, rng: Generator) -> None:
        self.frame, self.rng = frame, rng
        half_um = 0.75 * frame.edge_um + 40
        self.t_um = np.arange(-half_um, half_um, STEP_UM)
        angle = rng.choice([np.pi / 2, np.pi / 2, np.pi / 4, -np.pi / 4]) + rng.normal(0, 0.2)
        self.along = np.array([np.sin(angle), np.cos(angle)])
        self.across = np.array([-self.along[1], self.along[0]])
        spacing_um = 0.96 * frame.edge_um / max(num_trunks, 1)
        num_beyond = int(np.ceil(half_um / spacing_um)) + 1
        self.first, self.last = num_beyond, num_beyond + num_trunks - 1
        num = num_trunks + 2 * num_beyond
        gaps_um = np.stack([spacing_um * self._relative_gap() for _ in range(num)])
        edges_um = np.cumsum(gaps_um, axis=0) - gaps_um / 2
        middle_um = edges_um[self.first : self.first + max(num_trunks, 1)].mean(axis=0)
        bend_um = rng.uniform(4, 24) * smooth_noise(rng, len(self.t_um), 260) + rng.normal(0, 0.1 * spacing_um)
        self.smooth_um = edges_um - middle_um + bend_um
        jitter_um = np.stack([self._jitter(min(wander_um, 0.12 * spacing_um)) for _ in range(num)])
        self.jitter_um = _kept_apart(self.smooth_um + jitter_um) - self.smooth_um
        # The eye moves while the frame is scanned, so each image row is shifted sideways a little.
        self.shift_um = rng.uniform(0.3, 1.7) * smooth_noise(rng, int(frame.edge_um / STEP_UM) + 1, 45)

    def _relative_gap(self) -> Floats:
        num = len(self.t_um)
        varied = 0.22 * smooth_noise(self.rng, num, 150) + 0.16 * smooth_noise(self.rng, num, 60)
        return np.maximum(self.rng.lognormal(-0.08, 0.30) * np.exp(varied), 0.22)

    def _jitter(self, size_um: float) -> Floats:
        num = len(self.t_um)
        jitter = 0.7 * smooth_noise(self.rng, num, 70)
        for share, interval_um in ((0.45, 40), (0.20, 15), (0.07, 5)):
            jitter += share * kinked_noise(self.rng, num, interval_um)
        return size_um * jitter

    def gap_um(self, lane: int, side: int, index: int) -> float:
        """Distance at ``t_um[index]`` between trunk ``lane`` and its neighbour on ``side``, -1 or 1."""
        return float(abs(self.smooth_um[lane + side, index] - self.smooth_um[lane, index]))

    def at(self, point_um: Floats) -> tuple[int, int, float]:
        """Lane, index into ``t_um`` and share of the way across the lane of a point (y, x) of the frame."""
        offset_um = point_um - self.frame.edge_um / 2
        index = int(np.searchsorted(self.t_um, offset_um @ self.along))
        sideways_um, borders_um = offset_um @ self.across, self.smooth_um[:, index]
        lane = int(np.clip(np.searchsorted(borders_um, sideways_um) - 1, 0, len(borders_um) - 2))
        return lane, index, float((sideways_um - borders_um[lane]) / (borders_um[lane + 1] - borders_um[lane]))

    def trunk(self, lane: int) -> Floats:
        """Points (K, 2) of trunk ``lane``, one for each of ``t_um``."""
        return self._points(self.t_um, self.smooth_um[lane] + self.jitter_um[lane])

    def between(self, lane: int, side: int, indices: Indices, share: Floats) -> Floats:
        """Path through the lane from trunk ``lane`` (share 0) towards its neighbour on ``side`` (share 1).

        Near a trunk it follows that trunk's jitter, so that it starts exactly on it; midway it has none.
        """
        near_um, far_um = self.smooth_um[lane, indices], self.smooth_um[lane + side, indices]
        jitter_um = np.clip(1 - share, 0, 1) ** 4 * self.jitter_um[lane, indices]
        jitter_um = jitter_um + np.clip(share, 0, 1) ** 4 * self.jitter_um[lane + side, indices]
        return self._points(self.t_um[indices], near_um + share * (far_um - near_um) + jitter_um)

    def _points(self, t_um: Floats, sideways_um: Floats) -> Floats:
        points_um = self.frame.edge_um / 2 + t_um[:, None] * self.along + sideways_um[:, None] * self.across
        rows = np.clip(points_um[:, 0] / STEP_UM, 0, len(self.shift_um) - 1).astype(int)
        points_um[:, 1] += self.shift_um[rows]
        return points_um
