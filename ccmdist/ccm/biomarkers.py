"""ACCMetrics-style biomarkers of a nerve mask, with their exact definitions and units.

Written from published definitions, not from the ACCMetrics software, whose values these are not. A mask decides
them: compare only what one segmenter, or one annotator, made.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import label
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra

from ccmdist.ccm.skeleton import Bools, Branch, Floats, NerveGraph, nerve_graph
from ccmdist.ccm.units import frame_area_mm2

BIOMARKERS_VERSION: Final = "accmetrics-style-2"
BORDER_BAND: Final = 0.05
"""A main nerve begins and ends this close to the border, as a fraction of the frame's edge."""
MIN_SPAN: Final = 0.5
"""Its ends are farther apart than this fraction of the frame's edge."""
CHORD_STEP_UM: Final = 10.0
"""Distance between the points at which the course of a main nerve is read for its tortuosity."""


@dataclass(frozen=True)
class Biomarkers:
    """What is counted and measured on one frame. Densities are per area of the whole frame, H W um_per_px^2."""

    cnfd: float
    """Corneal nerve fibre density, no./mm2: main nerves over area; what a main nerve is, see :func:`main_nerves`."""
    cnbd: float
    """Corneal nerve branch density, no./mm2: branch points on main nerves over area. A branch point is a node of the
    centreline in which three or more branches meet, those within MERGED_PX taken as one; a crossing counts once."""
    cnfl: float
    """Corneal nerve fibre length density, mm/mm2: length of all nerves, main and other, over area. Along the smoothed
    centreline and up to where nerves end, see :mod:`~ccmdist.ccm.nerve_paths`; what two crossing nerves share counts
    twice."""
    cnfl_chain_code: float
    """The same in mm/mm2 by counting pixel steps of 1 and sqrt(2): straight lines read up to 8 % long, 5.5 % on average
    over angles."""
    ctbd: float
    """Corneal total branch density, no./mm2: all branch points over area, on main nerves or not."""
    cnfa: float
    """Corneal nerve fibre area, mm2/mm2: the fraction of the frame that the mask covers."""
    cnfw_um: float
    """Corneal nerve fibre width, um: area of the mask over length of its nerves, dust left out. NaN without a nerve."""
    cnfrd: float
    """Corneal nerve fractal dimension, no unit: of the mask by box counting, see :func:`box_dimension`. NaN without a
    nerve."""
    tortuosity: float
    """Mean over main nerves of :func:`tortuosity_coefficient`, no unit: 0 for straight ones. NaN without a main
    nerve."""


@dataclass(frozen=True)
class Quantity:
    """How a biomarker is named in tables."""

    field: str
    label: str
    unit: str


QUANTITIES: Final[Mapping[str, Quantity]] = MappingProxyType(
    {
        "cnfd": Quantity("cnfd", "CNFD", "no./mm²"),
        "cnbd": Quantity("cnbd", "CNBD", "no./mm²"),
        "cnfl": Quantity("cnfl", "CNFL", "mm/mm²"),
        "ctbd": Quantity("ctbd", "CTBD", "no./mm²"),
        "cnfa": Quantity("cnfa", "CNFA", "mm²/mm²"),
        "cnfw": Quantity("cnfw_um", "CNFW", "µm"),
        "cnfrd": Quantity("cnfrd", "CNFrD", ""),
        "tortuosity": Quantity("tortuosity", "Tortuosity", ""),
    }
)
"""Biomarkers by the names that margins and reports use."""


def biomarkers(nerve_mask: Bools, um_per_px: float) -> Biomarkers:
    """All biomarkers of one frame.

    A mask and its mirror images have the same biomarkers exactly. An empty mask has densities of zero and neither
    width, dimension nor tortuosity.

    Args:
        nerve_mask: True on nerves, shape (H, W).
        um_per_px: Edge of a pixel in micrometres.

    Raises:
        ValueError: If the mask is not boolean of two dimensions or the pixel size is not positive.

    Source:
        Definitions of CNFD, CNBD, CNFL, CTBD, CNFA, CNFW and CNFrD as in Chen et al. 2018 (PMC5830988); tortuosity
        after Kallinikos et al. 2004.
    """
    if nerve_mask.ndim != 2 or nerve_mask.dtype != bool:
        raise ValueError(
            f"nerve mask has dtype {nerve_mask.dtype} and shape {nerve_mask.shape}, expected bool of shape (H, W)"
        )
    if not um_per_px > 0:
        raise ValueError(f"um_per_px is {um_per_px}, expected a positive number of micrometres")
    graph = nerve_graph(_canonical_view(nerve_mask))
    height_px, width_px = nerve_mask.shape
    area_mm2 = frame_area_mm2(height_px, width_px, um_per_px)
    length_px = graph.length_px
    mains = main_nerves(graph)
    on_mains = {node for nerve in mains for node in nerve.nodes if graph.num_branches_at[node] >= 3}
    courses = [tortuosity_coefficient(nerve.path_px * um_per_px) for nerve in mains]
    return Biomarkers(
        cnfd=len(mains) / area_mm2,
        cnbd=len(on_mains) / area_mm2,
        cnfl=length_px * um_per_px / 1000 / area_mm2,
        cnfl_chain_code=graph.chain_code_px * um_per_px / 1000 / area_mm2,
        ctbd=int((graph.num_branches_at >= 3).sum()) / area_mm2,
        cnfa=float(nerve_mask.mean()),
        cnfw_um=_area_px(_canonical_view(nerve_mask), graph) / length_px * um_per_px if length_px else float("nan"),
        cnfrd=box_dimension(nerve_mask),
        tortuosity=float(np.mean(courses)) if courses else float("nan"),
    )


def _canonical_view(nerve_mask: Bools) -> Bools:
    """One of the mask and its mirror images, the same whichever of them is given.

    A thinning scans the frame in one direction, so without this a flipped mask would have slightly other counts.
    """
    views = [nerve_mask, nerve_mask[::-1], nerve_mask[:, ::-1], nerve_mask[::-1, ::-1]]
    return min((np.ascontiguousarray(view) for view in views), key=lambda view: view.tobytes())


def _area_px(nerve_mask: Bools, graph: NerveGraph) -> int:
    """Pixels of those pieces of the mask that have a centreline: dust has none and must not widen the others."""
    labels, num_pieces = label(nerve_mask, np.ones((3, 3), bool))
    has_centreline = np.zeros(num_pieces + 1, bool)
    has_centreline[labels[graph.centreline]] = True
    return int(has_centreline[labels[nerve_mask]].sum())


@dataclass(frozen=True)
class MainNerve:
    """A way through the graph from border to border."""

    nodes: tuple[int, ...]
    path_px: Floats
    """Smoothed points (K, 2) as (row, column) from end to end."""


def main_nerves(graph: NerveGraph) -> list[MainNerve]:
    """The main nerves of a frame, the straightest first.

    A main nerve is the shortest way along the centreline between two nerve ends that both lie within BORDER_BAND of
    the frame's border and more than MIN_SPAN of its edge (the shorter one) apart. Two main nerves share no branch;
    they may share a crossing. Of ways that overlap, the one with the smaller ratio of length to distance counts.

    Source:
        The rule of the ACCMetrics tutorial as ENA studies state it (both ends near the border, more than half the
        frame apart, no overlap); the order of ties by straightness alone is ours.
    """
    edge_px = min(graph.centreline.shape)
    tips = np.flatnonzero(graph.num_branches_at == 1).tolist()
    ends = [node for node in tips if _border_distance_px(graph, node) <= BORDER_BAND * edge_px]
    ways = sorted(_ways(graph, ends, MIN_SPAN * edge_px), key=lambda way: way[0])
    free = dict.fromkeys(_shortest_branches(graph), True)
    mains: list[MainNerve] = []
    for _, nodes in ways:
        steps = [(min(pair), max(pair)) for pair in pairwise(nodes)]
        if all(free[step] for step in steps):
            free.update(dict.fromkeys(steps, False))
            mains.append(MainNerve(nodes, _path_px(graph, nodes)))
    return mains


def _border_distance_px(graph: NerveGraph, node: int) -> float:
    row, column = graph.node_px[node]
    height, width = graph.centreline.shape
    return float(min(row, column, height - 1 - row, width - 1 - column))


def _shortest_branches(graph: NerveGraph) -> dict[tuple[int, int], Branch]:
    """The shortest branch between each pair of nodes that has one."""
    shortest: dict[tuple[int, int], Branch] = {}
    for branch in sorted(graph.branches, key=lambda branch: -branch.length_px):
        first, second = branch.nodes
        if first != second:
            shortest[min(first, second), max(first, second)] = branch
    return shortest


def _ways(graph: NerveGraph, ends: list[int], min_span_px: float) -> list[tuple[float, tuple[int, ...]]]:
    """Length over distance, and nodes, of the shortest way between each pair of ends that lie far enough apart."""
    branches = _shortest_branches(graph)
    if len(ends) < 2 or not branches:
        return []
    first, second = np.array(list(branches)).T
    lengths = [branch.length_px for branch in branches.values()]
    steps = csr_matrix((lengths, (first, second)), shape=(len(graph.node_px),) * 2)
    lengths_px, before = dijkstra(steps, directed=False, indices=ends, return_predecessors=True)
    ways = []
    for row, start in enumerate(ends):
        for stop in ends[row + 1 :]:
            span_px = float(np.linalg.norm(graph.node_px[start] - graph.node_px[stop]))
            if span_px > min_span_px and np.isfinite(lengths_px[row, stop]):
                ways.append((float(lengths_px[row, stop]) / span_px, _traced(before[row], stop)))
    return ways


def _traced(before: NDArray[np.int32], stop: int) -> tuple[int, ...]:
    nodes = [stop]
    while before[nodes[-1]] >= 0:
        nodes.append(int(before[nodes[-1]]))
    return tuple(nodes)


def _path_px(graph: NerveGraph, nodes: tuple[int, ...]) -> Floats:
    branches = _shortest_branches(graph)
    parts = []
    for start, stop in pairwise(nodes):
        branch = branches[min(start, stop), max(start, stop)]
        parts.append(branch.path_px if branch.nodes[0] == start else branch.path_px[::-1])
    return np.concatenate(parts)


def tortuosity_coefficient(path_um: Floats) -> float:
    """How far the course of a nerve departs from a straight line: 0 for one.

    The nerve is turned so that the chord between its ends is the x axis, read as y(x) every CHORD_STEP_UM, and

        tortuosity = sqrt( mean over x of (y'^2 + (CHORD_STEP_UM y'')^2) ).

    Kallinikos sums y'^2 + y''^2 over pixels, which grows with the nerve's length and changes with the pixel size; the
    mean, and the length that makes y'' a pure number, remove both. Where a nerve turns back, the first pass counts.

    Args:
        path_um: Points (K, 2) along the nerve in micrometres.

    Source:
        After Kallinikos et al. 2004, Invest. Ophthalmol. Vis. Sci. 45(2).
    """
    chord = path_um[-1] - path_um[0]
    length_um = float(np.linalg.norm(chord))
    if length_um < 3 * CHORD_STEP_UM:
        return float("nan")
    along = chord / length_um
    x_um = np.maximum.accumulate((path_um - path_um[0]) @ along)
    y_um = (path_um - path_um[0]) @ np.array([-along[1], along[0]])
    is_new = np.concatenate([[True], np.diff(x_um) > 0])
    steps_um = np.linspace(0, length_um, max(round(length_um / CHORD_STEP_UM), 3) + 1)
    course_um = np.interp(steps_um, x_um[is_new], y_um[is_new])
    slope = np.gradient(course_um, steps_um)
    bend = CHORD_STEP_UM * np.gradient(slope, steps_um)
    return float(np.sqrt(np.mean(slope**2 + bend**2)))


def box_dimension(nerve_mask: Bools) -> float:
    """Fractal dimension by box counting: minus the slope of log N(s) over log s.

    N(s) is the number of boxes of edge s px that hold a nerve, for s = 2, 4, 8, ... up to a quarter of the shorter
    edge, averaged over grids that start in each of the four corners.

    Returns:
        1 for a straight line, 2 for a full frame, NaN for an empty mask or one of less than 16 px.
    """
    sizes_px = [2**power for power in range(1, 12) if 2**power <= min(nerve_mask.shape) / 4]
    if not nerve_mask.any() or len(sizes_px) < 2:
        return float("nan")
    views = [nerve_mask, nerve_mask[::-1], nerve_mask[:, ::-1], nerve_mask[::-1, ::-1]]
    counts = [np.mean([_num_boxes(view, size_px) for view in views]) for size_px in sizes_px]
    return float(-np.polyfit(np.log(sizes_px), np.log(counts), 1)[0])


def _num_boxes(nerve_mask: Bools, size_px: int) -> int:
    height, width = (-(-edge // size_px) for edge in nerve_mask.shape)
    padded = np.zeros((height * size_px, width * size_px), bool)
    padded[: nerve_mask.shape[0], : nerve_mask.shape[1]] = nerve_mask
    return int(padded.reshape(height, size_px, width, size_px).any(axis=(1, 3)).sum())
