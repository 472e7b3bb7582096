"""The model as a graph: its own layered drawing, without a graph program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch

from toolkit.reporting.contents import Picture
from toolkit.reporting.figures.canvas import blank, plain, styled
from toolkit.reporting.palette import BAND, INK, LINE, PAGE, SOFT

_WIDE, _HIGH = 1.75, 1.15
_NODE_WIDTH, _NODE_HEIGHT = 1.45, 0.52


@dataclass(frozen=True)
class Node:
    """A site of the graph: its kind as in `modelling.sites`, its distribution, its plates with sizes, its parents."""

    name: str
    kind: str
    distribution: str
    plates: tuple[str, ...]
    parents: tuple[str, ...]


def model_graph(nodes: Sequence[Node]) -> Picture:
    """Sites as nodes in layers, arrows from what a site depends on; observed sites are filled."""
    places = layered(nodes)
    columns = max(x for x, _ in places.values()) + 1
    rows = max(y for _, y in places.values()) + 1
    with styled():
        figure, grid = blank(max(3.2, 0.3 + _WIDE * columns), 0.3 + _HIGH * rows)
        axes = grid[0, 0]
        by_name = {node.name: node for node in nodes}
        for node in nodes:
            for parent in node.parents:
                _arrow(axes, places[parent], places[node.name], columns)
        for name, (x, y) in places.items():
            _node(axes, by_name[name], x * _WIDE, -y * _HIGH)
        axes.set_xlim(-_WIDE / 2, (columns - 0.5) * _WIDE)
        axes.set_ylim(-(rows - 0.55) * _HIGH - 0.12, 0.45 * _HIGH)
        axes.set_aspect("equal")
        axes.set_axis_off()
    edges = [f"{node.name} from {', '.join(node.parents)}" for node in nodes if node.parents]
    shown = "; ".join(edges[:12]) + (f"; and {len(edges) - 12} more" if len(edges) > 12 else "")
    alt = f"Graph of {len(nodes)} sites. Dependences: {shown or 'none'}."
    reading = (
        "An arrow leads from a site to what depends on it. Filled: observed. Boxes with square corners: computed. "
        "The small line below a name gives its distribution, then the plates it repeats over."
    )
    return Picture("model_graph", figure, alt, reading)


def layered(nodes: Sequence[Node]) -> dict[str, tuple[float, int]]:
    """Node name to (column, layer): a layer below all parents, columns by the mean of the parents, layers centred."""
    layer: dict[str, int] = {}
    for node in nodes:  # program order, so parents come first
        layer[node.name] = 1 + max((layer[parent] for parent in node.parents if parent in layer), default=-1)
    widest = max(sum(1 for value in layer.values() if value == row) for row in set(layer.values()))
    places: dict[str, tuple[float, int]] = {}
    for row in range(max(layer.values()) + 1):
        names = [node for node in nodes if layer[node.name] == row]
        names.sort(key=lambda node: _pull(node, places))
        left = (widest - len(names)) / 2
        places.update({node.name: (left + i, row) for i, node in enumerate(names)})
    return places


def _pull(node: Node, places: Mapping[str, tuple[float, int]]) -> float:
    known = [places[parent][0] for parent in node.parents if parent in places]
    return sum(known) / len(known) if known else 0.0


def _arrow(axes: Axes, start: tuple[float, int], end: tuple[float, int], columns: float) -> None:
    """An arrow between two nodes; it bends around the layers that it passes by."""
    (x0, y0), (x1, y1) = start, end
    skipped = y1 - y0 - 1
    bend = 0.0 if skipped == 0 else 0.22 * min(skipped, 3) * (1 if x0 >= (columns - 1) / 2 else -1)
    axes.add_patch(
        FancyArrowPatch(
            (x0 * _WIDE, -y0 * _HIGH - _NODE_HEIGHT / 2),
            (x1 * _WIDE, -y1 * _HIGH + _NODE_HEIGHT / 2),
            arrowstyle="-|>",
            mutation_scale=8,
            linewidth=0.8,
            color=SOFT.light,
            connectionstyle=f"arc3,rad={bend}",
            shrinkA=0,
            shrinkB=1,
            zorder=1,
        )
    )


def _node(axes: Axes, node: Node, x: float, y: float) -> None:
    fill = BAND.light if node.kind in ("observed", "factor") else PAGE.light
    edge: dict[str, Any] = {
        "facecolor": fill,
        "edgecolor": LINE.light if node.kind == "deterministic" else SOFT.light,
        "linewidth": 0.9,
    }
    if node.kind in ("deterministic", "factor"):
        corner = (x - _NODE_WIDTH / 2, y - _NODE_HEIGHT / 2)
        shape = FancyBboxPatch(corner, _NODE_WIDTH, _NODE_HEIGHT, boxstyle="square,pad=0", zorder=2, **edge)
        axes.add_patch(shape)
    else:
        axes.add_patch(Ellipse((x, y), _NODE_WIDTH, _NODE_HEIGHT, zorder=2, **edge))
    axes.text(x, y + 0.07, plain(node.name, 18), ha="center", va="center", fontsize=8.5, color=INK.light, zorder=3)
    below = {"factor": "factor", "deterministic": "computed"}.get(node.kind, node.distribution)
    axes.text(x, y - 0.11, plain(below, 20), ha="center", va="center", fontsize=7, color=SOFT.light, zorder=3)
    if node.plates:
        axes.text(
            x + _NODE_WIDTH / 2 - 0.02,
            y - _NODE_HEIGHT / 2 - 0.06,
            plain(", ".join(node.plates), 26),
            ha="right",
            va="center",
            fontsize=7,
            color=SOFT.light,
            zorder=3,
        )
