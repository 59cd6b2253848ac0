"""The centreline of a nerve mask as a graph: smoothed branches between ends and branch points.

The thinning is scikit-image's and the graph is skan's; what is a spur, one branch point and the length of a branch is
decided here. skan compiles itself at its first use, so it is imported where it is needed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ccmdist.ccm.nerve_paths import Bools, Floats, ended, half_widths, smoothed

MIN_PIECE_PX: Final = 10
"""Pixels below which a connected piece of centreline is dust and not a nerve."""
MAX_SPUR_PX: Final = 5
"""Length up to which a dead end beside a branch point is an artefact of the thinning."""
MERGED_PX: Final = 8.0
"""Branch points that lie this close along a branch are one: a crossing is thinned to two forks, and where two nerves
touch they share a few pixels."""

Pixel = tuple[int, int]
_NEIGHBOURS: Final = tuple((row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if row or column)
_EIGHT_NEIGHBOURS: Final = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Branch:
    """A stretch of nerve between two nodes."""

    nodes: tuple[int, int]
    """Equal for a ring, and for the short piece inside a crossing."""
    path_px: Floats
    """Smoothed points (K, 2) as (row, column), from the first node to the second; a dead end lies where the nerve
    ends, see :func:`~ccmdist.ccm.nerve_paths.ended`."""
    chain_code_px: float
    """Length counted as 1 per straight and sqrt(2) per diagonal step: 5.5 % long on average over angles."""
    num_nerves: int = 1
    """2 for the short piece inside a crossing, which belongs to both of the nerves that cross."""

    @property
    def length_px(self) -> float:
        """Length of the smoothed path."""
        return float(np.linalg.norm(np.diff(self.path_px, axis=0), axis=1).sum())


@dataclass(frozen=True)
class NerveGraph:
    """Branches, and where their nodes lie."""

    centreline: Bools
    """(H, W), one pixel wide."""
    branches: tuple[Branch, ...]
    node_px: Floats
    """(N, 2) as (row, column)."""
    num_branches_at: NDArray[np.int64]
    """(N,): branch ends that meet in a node; 1 is an end of a nerve, 3 or more a branch point."""

    @property
    def length_px(self) -> float:
        """Length of all nerves along their smoothed paths."""
        return sum(branch.num_nerves * branch.length_px for branch in self.branches)

    @property
    def chain_code_px(self) -> float:
        """The same by counting pixel steps, without what was done to the ends."""
        return sum(branch.num_nerves * branch.chain_code_px for branch in self.branches)


def nerve_graph(nerve_mask: Bools) -> NerveGraph:
    """The graph of a nerve mask's centreline, without dust and spurs.

    Args:
        nerve_mask: True on nerves, shape (H, W).
    """
    centreline = centreline_of(nerve_mask)
    if not centreline.any():
        return NerveGraph(centreline, (), np.empty((0, 2)), np.empty(0, np.int64))
    from skan import Skeleton, summarize

    skeleton = Skeleton(centreline, keep_images=False)
    table = summarize(skeleton, separator="_")
    ends = table[["node_id_src", "node_id_dst"]].to_numpy()
    lengths_px = table["branch_distance"].to_numpy(float)
    names, nodes = np.unique(ends, return_inverse=True)
    nodes = nodes.reshape(ends.shape)
    merged = _merged(nodes, lengths_px)
    num_nodes = int(merged.max()) + 1
    position_px = np.asarray(skeleton.coordinates, float)[names]
    totals = np.stack(
        [np.bincount(merged, weights=position_px[:, axis], minlength=num_nodes) for axis in (0, 1)], axis=1
    )
    node_px = totals / np.bincount(merged, minlength=num_nodes)[:, None]
    # The short piece inside a crossing has both ends in one node and is no arm of it; nor does a ring have an end.
    arms = merged[nodes][merged[nodes[:, 0]] != merged[nodes[:, 1]]]
    num_branches_at = np.bincount(arms.ravel(), minlength=num_nodes)
    # Both of the nerves that cross go through it.
    is_shared = (merged[nodes[:, 0]] == merged[nodes[:, 1]]) & (nodes[:, 0] != nodes[:, 1])
    is_shared &= num_branches_at[merged[nodes[:, 0]]] >= 4
    paths_px = [smoothed(np.asarray(skeleton.path_coordinates(index), float)) for index in range(len(ends))]
    _end(paths_px, merged[nodes], num_branches_at, half_widths(nerve_mask))
    for (first, second), path_px in zip(merged[nodes], paths_px, strict=True):
        for node, tip_px in ((first, path_px[0]), (second, path_px[-1])):
            if num_branches_at[node] == 1:
                node_px[node] = tip_px
    branches = tuple(
        Branch((int(first), int(second)), path_px, float(chain_code_px), 1 + int(shared))
        for (first, second), path_px, chain_code_px, shared in zip(
            merged[nodes], paths_px, lengths_px, is_shared, strict=True
        )
    )
    return NerveGraph(centreline, branches, node_px, num_branches_at)


def _end(
    paths_px: list[Floats], nodes: NDArray[np.int64], num_branches_at: NDArray[np.int64], half_width_px: Floats
) -> None:
    """Move the dead ends of the paths to where their nerves end."""
    for index, is_dead_end in enumerate(num_branches_at[nodes] == 1):
        if is_dead_end[1]:
            paths_px[index] = ended(paths_px[index], half_width_px)
        if is_dead_end[0]:
            paths_px[index] = ended(paths_px[index][::-1], half_width_px)[::-1]


def centreline_of(nerve_mask: Bools) -> Bools:
    """The thinned mask without dust and spurs, shape (H, W)."""
    from skimage.morphology import skeletonize

    return without_dust(pruned(skeletonize(nerve_mask), MAX_SPUR_PX), MIN_PIECE_PX)


def without_dust(centreline: Bools, min_px: int) -> Bools:
    """The connected pieces of a centreline that have at least ``min_px`` pixels."""
    labels, _ = label(centreline, _EIGHT_NEIGHBOURS)
    is_long = np.bincount(labels.ravel()) >= min_px
    is_long[0] = False
    kept: Bools = is_long[labels]
    return kept


def pruned(centreline: Bools, max_spur_px: int) -> Bools:
    """The centreline without dead ends of at most ``max_spur_px`` pixels beside a branch point."""
    from skimage.morphology import skeletonize

    centreline = skeletonize(centreline)
    # Where two spurs met, a longer one may be left: once more, but a tree is not eaten up from its leaves.
    for _ in range(2):
        spurs = [pixel for spur in _spurs(centreline, max_spur_px) for pixel in spur]
        if not spurs:
            break
        centreline[tuple(np.array(spurs).T)] = False
        centreline = skeletonize(centreline)
    return centreline


def _spurs(centreline: Bools, max_spur_px: int) -> Iterator[list[Pixel]]:
    pixels = {(int(row), int(column)) for row, column in zip(*np.nonzero(centreline), strict=True)}
    height, width = centreline.shape
    for end in pixels:
        # What leaves the frame is cut off there and may well be long.
        at_border = not (1 < end[0] < height - 2 and 1 < end[1] < width - 2)
        if not at_border and len(_around(end, pixels)) == 1:
            walk = _walk(end, pixels, max_spur_px)
            if walk is not None:
                yield walk


def _walk(end: Pixel, pixels: set[Pixel], max_spur_px: int) -> list[Pixel] | None:
    """Pixels from a dead end up to a branch point; None if there is none within reach."""
    walk = [end]
    while len(walk) <= max_spur_px:
        ahead = [pixel for pixel in _around(walk[-1], pixels) if pixel not in walk]
        if not ahead:
            return None
        nearest = min(ahead, key=lambda pixel: abs(pixel[0] - walk[-1][0]) + abs(pixel[1] - walk[-1][1]))
        if len(ahead) > 1 or len(_around(nearest, pixels)) > 2:
            return walk
        walk.append(nearest)
    return None


def _around(pixel: Pixel, pixels: set[Pixel]) -> list[Pixel]:
    row, column = pixel
    return [place for down, right in _NEIGHBOURS if (place := (row + down, column + right)) in pixels]


def _merged(nodes: NDArray[np.int64], lengths_px: Floats) -> NDArray[np.int64]:
    """For each node, the number of the node that it and its near neighbours become."""
    num_nodes = int(nodes.max()) + 1
    degree = np.bincount(nodes.ravel(), minlength=num_nodes)
    is_bridge = (degree[nodes] >= 3).all(axis=1) & (lengths_px <= MERGED_PX)
    first, second = nodes[is_bridge].T
    pairs = coo_matrix((np.ones(len(first)), (first, second)), shape=(num_nodes, num_nodes))
    merged: NDArray[np.int64] = connected_components(pairs, directed=False)[1].astype(np.int64)
    return merged
