"""A judge of biomarkers: the planar graph of a phantom's fibres, made of their lines alone and without any pixel.

shapely finds where lines meet or cross, networkx the shortest ways: neither mask nor centreline nor our code is read.
"""

from dataclasses import dataclass
from itertools import combinations, pairwise

import networkx as nx
import numpy as np
import shapely
from shapely import LineString

GRID_UM = 0.01
"""Lines are snapped to this grid, so that a branch that starts on its trunk has a node there."""
ONE_NODE_UM = {"lines": 1.0, "widths": 4.5}
"""Nodes that lie closer together along a line are one: about a pixel, or about the width of a nerve."""
BORDER_BAND, MIN_SPAN = 0.05, 0.5


@dataclass(frozen=True)
class Truth:
    """Biomarkers of the lines; densities per mm2, length in mm per mm2."""

    cnfd: float
    cnbd: float
    cnfl: float
    ctbd: float


def truth_of(nerves, size_px, um_per_px, of):
    """The biomarkers of a phantom's fibres.

    of: lines, which meet where they cross or begin on each other; or widths, which also meet where two fibres, each as
        wide as it is drawn, touch each other.
    """
    edge_um = size_px * um_per_px
    lines, half_um = _clipped(nerves.fibres, edge_um, um_per_px)
    joints = list(_contacts(lines, half_um)) if of == "widths" else []
    pieces = shapely.unary_union(np.array(lines + joints, dtype=object), grid_size=GRID_UM)
    pieces = shapely.get_parts(shapely.line_merge(pieces))
    graph = _graph(pieces, ONE_NODE_UM[of])
    mains = _main_nerves(graph, edge_um)
    branch_points = {node for node in graph if graph.degree(node) >= 3}
    area_mm2 = (edge_um / 1000) ** 2
    return Truth(
        cnfd=len(mains) / area_mm2,
        cnbd=len(branch_points & {node for way in mains for node in way}) / area_mm2,
        cnfl=sum(line.length for line in lines) / 1000 / area_mm2,
        ctbd=len(branch_points) / area_mm2,
    )


def _clipped(fibres, edge_um, um_per_px):
    frame = shapely.box(0, 0, edge_um, edge_um)
    lines, half_um = [], []
    for fibre in fibres:
        for part in shapely.get_parts(LineString(fibre.path_um).intersection(frame)):
            if part.length > 0:
                lines.append(part)
                half_um.append(max(um_per_px, fibre.fwhm_um / 2))
    return lines, half_um


def _contacts(lines, half_um):
    """For each run over which two fibres touch without crossing, the shortest line between their middles."""
    for one, other in combinations(range(len(lines)), 2):
        near = shapely.buffer(lines[other], half_um[one] + half_um[other])
        for run in shapely.get_parts(lines[one].intersection(near)):
            if run.distance(lines[other]) > GRID_UM:
                yield shapely.shortest_line(run, lines[other])


def _graph(pieces, one_node_um):
    """Pieces between nodes; nodes of degree 3 and more that lie close together are one."""
    raw = nx.MultiGraph()
    for piece in pieces:
        raw.add_edge(piece.coords[0], piece.coords[-1], length=piece.length)
    near = nx.Graph()
    near.add_nodes_from(raw)
    for first, second, length in raw.edges(data="length"):
        if length <= one_node_um and min(raw.degree(first), raw.degree(second)) >= 3:
            near.add_edge(first, second)
    name = {place: number for number, places in enumerate(nx.connected_components(near)) for place in places}
    graph = nx.MultiGraph()
    for place, number in name.items():
        graph.add_node(number, place=np.array(place))
    for first, second, length in raw.edges(data="length"):
        if name[first] != name[second] or length > 3 * one_node_um:
            graph.add_edge(name[first], name[second], length=length)
    return graph


def _main_nerves(graph, edge_um):
    """Shortest ways between ends near the border that lie far apart; the straightest first, without overlap."""
    ways = nx.Graph()
    for first, second, length in graph.edges(data="length"):
        if first != second and length < ways.get_edge_data(first, second, {"length": np.inf})["length"]:
            ways.add_edge(first, second, length=length)
    place = graph.nodes(data="place")
    tips = [
        node
        for node in graph
        if graph.degree(node) == 1 and min(*place[node], *(edge_um - place[node])) <= BORDER_BAND * edge_um
    ]
    found = []
    for first, second in combinations(tips, 2):
        span_um = np.linalg.norm(place[first] - place[second])
        if span_um > MIN_SPAN * edge_um and first in ways and second in ways and nx.has_path(ways, first, second):
            length_um, way = nx.bidirectional_dijkstra(ways, first, second, weight="length")
            found.append((length_um / span_um, way))
    taken, mains = set(), []
    for _, way in sorted(found):
        steps = {frozenset(step) for step in pairwise(way)}
        if not steps & taken:
            taken |= steps
            mains.append(way)
    return mains
