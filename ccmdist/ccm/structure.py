"""What stands for the nerves of a frame: their mask, a sparse map of points, or both in one picture.

The paper conditions on a map of nuclei centroids, one class of cell per colour. What is ours is the translation to
corneal nerves: the points are where nerves branch, where they end, and where dendritic cells lie; and the dense mask
may stand behind them.

A map of points is (H, W) uint8, 0 or one of the codes below, one pixel for each point.

Source: Xu and Prasanna, arXiv 2603.04565 (multi-class map of centroids).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from ccmdist.config.data import Structure

NO_POINT, BRANCH_POINT, END_POINT, DENDRITIC_CELL = range(4)
POINT_CODES: Final = (NO_POINT, BRANCH_POINT, END_POINT, DENDRITIC_CELL)

COLOURS: Final[Mapping[int, tuple[int, int, int]]] = MappingProxyType(
    {BRANCH_POINT: (255, 64, 0), END_POINT: (0, 160, 255), DENDRITIC_CELL: (255, 230, 0)}
)
"""Of the discs: far from each other, from black and from the white of the mask, for the encoders and for eyes that
mistake red for green. Where discs overlap, each is seen up to the middle between them."""
PX_PER_RADIUS: Final = 96
"""Edge of a frame over the radius of a disc: 4 px at 384 px, a little more than a patch of the VAE across."""
MIN_RADIUS_PX: Final = 3
"""In a smaller frame too a disc is nearly as wide as a patch of the VAE, 8 px, so it cannot vanish between two."""
PX_PER_BORDER: Final = 48
MIN_BORDER_PX: Final = 3
"""A nerve that ends this close to the border of the frame has left it; 8 px at 384 px. Masks drawn by hand often stop
a few pixels before."""

Bools = NDArray[np.bool_]
Bytes = NDArray[np.uint8]


def structure_picture(nerve_mask: Bools, points: Bytes | None, structure: Structure) -> Bytes:
    """The picture that stands for the nerves.

    Args:
        nerve_mask: (H, W).
        points: Map of points (H, W); None makes one of the mask, see :func:`points_of_mask`.
        structure: "mask" gives (H, W), 0 or 255. "points" and "mask_and_points" give (H, W, 3), black or the white mask
            behind a disc in the colour of its class for each point.
    """
    grey = nerve_mask.astype(np.uint8) * 255
    if structure == "mask":
        return grey
    if structure == "points":
        grey[:] = 0
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    points = points_of_mask(nerve_mask) if points is None else points
    # Half a pixel more makes a small disc round instead of a square on its corner.
    nearest_px = np.full(points.shape, max(MIN_RADIUS_PX, round(len(points) / PX_PER_RADIUS)) + 0.5)
    for code, colour in COLOURS.items():
        if (points == code).any():
            away_px = distance_transform_edt(points != code)
            is_nearest = away_px <= nearest_px
            picture[is_nearest], nearest_px[is_nearest] = colour, away_px[is_nearest]
    return picture


def points_of_mask(nerve_mask: Bools) -> Bytes:
    """The branch points and ends of a mask's graph as a map of points (H, W); dendritic cells are not in a mask.

    A crossing counts as one branch point, as two dimensions cannot tell them apart.
    """
    # The codes above are read where no graph is made, and what makes graphs takes a third of a second to import.
    from ccmdist.ccm.skeleton import nerve_graph

    graph = nerve_graph(nerve_mask)
    ends = graph.node_px[graph.num_branches_at == 1]
    border_px = max(MIN_BORDER_PX, max(nerve_mask.shape) / PX_PER_BORDER)
    is_inside = ((ends >= border_px) & (ends <= np.array(nerve_mask.shape) - 1 - border_px)).all(axis=1)
    points = np.zeros(nerve_mask.shape, np.uint8)
    mark_points(points, ends[is_inside], END_POINT)
    mark_points(points, graph.node_px[graph.num_branches_at >= 3], BRANCH_POINT)
    return points


def mark_points(points: Bytes, places_px: NDArray[np.float64], code: int) -> None:
    """Set the pixels that hold the places (N, 2) as (row, column); one outside of the frame goes to its border."""
    rows, columns = np.clip(np.rint(places_px).astype(int), 0, np.array(points.shape) - 1).T
    points[rows, columns] = code
