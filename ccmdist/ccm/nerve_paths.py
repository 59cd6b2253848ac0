"""From the pixels of a thinned nerve to the line of its course: without stairs, and up to where the nerve ends.

A thinning says which pixels a nerve passes. Their chain is a staircase, which is longer than the nerve, and it stops
up to a few pixels before the end of the mask or beyond, by an amount that depends on the angle.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt, gaussian_filter1d

SMOOTHING_PX: Final = 1.25
"""Standard deviation, in pixels along the branch, by which a path is smoothed before its length is taken. More costs
small bends of nerves, less leaves stairs."""
HEADING_PX: Final = 8
"""Pixels at the end of a path that say where it heads."""
RAY_STEP_PX: Final = 0.05
SIDEWAYS_PX: Final = (-0.5, 0.0, 0.5)
"""The mask is followed on three rays side by side: in a thin slanted nerve one alone finds a gap between pixels. The
longest counts; it is a third of a pixel too long, and so are half widths, which cancels out."""

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]


def smoothed(path_px: Floats) -> Floats:
    """The path (K, 2) through a Gaussian along its pixels; its two ends stay where they are.

    A staircase of pixels becomes a line, so that straight lines of every angle have their true length. A circle of
    radius r px becomes shorter by SMOOTHING_PX^2 / (2 r^2): 0.2 % at 20 px.
    """
    reach = min(int(4 * SMOOTHING_PX), len(path_px) - 1)
    padded = np.pad(path_px, ((reach, reach), (0, 0)), mode="reflect", reflect_type="odd")
    return np.asarray(gaussian_filter1d(padded, SMOOTHING_PX, axis=0, mode="nearest")[reach : len(padded) - reach])


def half_widths(nerve_mask: Bools) -> Floats:
    """For each pixel (H, W) the distance to the nearest one beside the nerve, which goes on outside of the frame."""
    return np.asarray(distance_transform_edt(np.pad(nerve_mask, 1, mode="edge"))[1:-1, 1:-1])


def ended(path_px: Floats, half_width_px: Floats) -> Floats:
    """The path with its last point, a dead end, moved along its heading to where the nerve ends.

    A nerve that runs out of the frame ends at the frame's border. One that ends within it has a round end in its mask:
    it ends half of its width before its mask does.

    Args:
        path_px: Points (K, 2) as (row, column).
        half_width_px: (H, W), of the mask, see :func:`half_widths`.
    """
    last = path_px[-HEADING_PX - 1 :]
    heading = last[-1] - last[0]
    if not heading.any():
        return path_px
    heading = heading / np.linalg.norm(heading)
    start = last.mean(axis=0)
    start = start + ((last[-1] - start) @ heading) * heading
    half_px = float(np.median(_at(half_width_px, path_px)))
    reach_px = _reach_px(start, heading, half_width_px > 0, half_px)
    num_kept = len(path_px)
    while num_kept > 1 and (path_px[num_kept - 1] - start) @ heading >= reach_px:
        num_kept -= 1
    return np.concatenate([path_px[:num_kept], [start + reach_px * heading]])


def _reach_px(start: Floats, heading: Floats, nerve_mask: Bools, half_px: float) -> float:
    """How far ahead of ``start`` the nerve ends; negative if it ends before it."""
    ahead_px = np.arange(0, 4 * half_px + HEADING_PX / 2, RAY_STEP_PX)
    ray = start + ahead_px[:, None] * heading
    in_frame = ((ray >= -0.5) & (ray <= np.array(nerve_mask.shape) - 0.5)).all(axis=1)
    sideways = np.array([-heading[1], heading[0]])
    on_nerve = np.any([_at(nerve_mask, ray + shift_px * sideways) for shift_px in SIDEWAYS_PX], axis=0)
    first_outside, first_beside = (int(np.argmin(np.append(row, False))) for row in (in_frame, on_nerve))
    if first_outside <= first_beside:
        return RAY_STEP_PX * max(first_outside - 1, 0)
    return RAY_STEP_PX * first_beside - half_px


def _at(frame: NDArray, points_px: Floats) -> NDArray:
    """Values of the pixels that hold the points; beyond the border, of the nearest pixel."""
    rows, columns = np.clip(np.rint(points_px).astype(int), 0, np.array(frame.shape) - 1).T
    return frame[rows, columns]
