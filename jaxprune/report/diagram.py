# SPDX-License-Identifier: Apache-2.0
"""A picture of a graph, as SVG: which channel groups feed which.

A box is a group; a line is a weight that sums over one group's channels to make
another's. Lines that lead back (a residual branch returning to its trunk) are dashed.
"""

from collections import defaultdict
from collections.abc import Mapping
from html import escape
from typing import NamedTuple

import numpy as np

from jaxprune.base import INPUT, OUTPUT, Graph, Group, Keep, Path, path_str
from jaxprune.report import words

SOURCE, SINK, STUCK = "input", "output", "frozen"
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 210, 36, 30, 34, 20
INK, LINE, FULL, KEPT = "#202020", "#777777", "#E4E4E4", "#8FC1E3"
_DASHED = ' stroke-dasharray="4 3"'

Edges = dict[tuple[str, str], list[Path]]


class Box(NamedTuple):
    """Where a node's box is: its left upper corner, and its row."""

    x: float
    y: float
    row: int


def svg(graph: Graph, keep: Keep | None = None) -> str:
    """The groups of a graph and how they depend on each other, as an SVG document.

    keep: {group: bool[C]}; each box then shows how many of its channels stay. The
    boxes' tooltips list the axes that a group consists of, the lines' the weights.
    """
    edges = dependencies(graph)
    boxes, width, height = _layout(graph, edges)
    parts = [_line(edge, weights, boxes) for edge, weights in edges.items()]
    if any(part and _DASHED in part for part in parts):
        parts.append(
            f'<text x="{MARGIN}" y="{height}" fill="{LINE}">dashed: back to a group '
            "that was read before</text>"
        )
        height += MARGIN
    for name, box in boxes.items():
        group = graph.groups.get(name)
        kept = int(np.sum(keep[name])) if group and keep is not None else None
        parts.append(_box(name, box, group, kept))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="sans-serif" '
            f'font-size="12" fill="{INK}">',
            '<rect width="100%" height="100%" fill="white"/>',
            *[part for part in parts if part],
            "</svg>\n",
        ]
    )


def dependencies(graph: Graph) -> Edges:
    """{(from, to): the weights between} of groups.

    SOURCE is the network's input, SINK its output, and STUCK any channels that
    something in between keeps whole.
    """
    into: dict[Path, list[str]] = defaultdict(list)
    made: dict[Path, list[str]] = defaultdict(list)
    for name, group in graph.groups.items():
        for slot in group.slots:
            (into if slot.role == "in" else made)[slot.path].append(name)
    first = {frozen.path for frozen in graph.frozen if frozen.cause == INPUT}
    last = {frozen.path for frozen in graph.frozen if frozen.cause == OUTPUT}
    edges: Edges = defaultdict(list)
    for leaf in graph.leaves:
        begin = into[leaf.path] or ([SOURCE] if leaf.path in first else [])
        end = made[leaf.path] or [SINK if leaf.path in last else STUCK]
        for a in begin:
            for b in end:
                if a in graph.groups or b in graph.groups:
                    edges[a, b].append(leaf.path)
    return dict(edges)


def _layout(graph: Graph, edges: Edges) -> tuple[dict[str, Box], int, int]:
    """A row for each step from the input; groups of one row stand side by side."""
    order = {name: i for i, name in enumerate([SOURCE, *graph.groups, STUCK, SINK])}
    rows = dict.fromkeys(order, 0)
    for name in (*graph.groups, STUCK):
        before = [a for a, b in edges if b == name and order[a] < order[name]]
        rows[name] = 1 + max((rows[a] for a in before), default=0)
    rows[SINK] = 1 + max(rows.values())
    used = {name for edge in edges for name in edge} | set(graph.groups)
    members: dict[int, list[str]] = defaultdict(list)
    for name in order:
        if name in used:
            members[rows[name]].append(name)
    most = max(map(len, members.values()), default=1)
    # Lines that pass rows by run in the margins.
    side = MARGIN + 20 + 7 * max((abs(rows[b] - rows[a]) for a, b in edges), default=0)
    side = min(side, 160)
    width = 2 * side + most * (WIDTH + GAP_X) - GAP_X
    boxes = {}
    for line, row in enumerate(sorted(members)):
        names = members[row]
        left = (width - len(names) * (WIDTH + GAP_X) + GAP_X) / 2
        for i, name in enumerate(names):
            x, y = left + i * (WIDTH + GAP_X), MARGIN + line * (HEIGHT + GAP_Y)
            boxes[name] = Box(x, y, line)
    return boxes, width, 2 * MARGIN + len(members) * (HEIGHT + GAP_Y) - GAP_Y


def _line(
    edge: tuple[str, str], weights: list[Path], boxes: Mapping[str, Box]
) -> str | None:
    a, b = (boxes[name] for name in edge)
    if a is b:
        return None
    title = f"<title>{escape(', '.join(map(path_str, weights)))}</title>"
    back = b.row <= a.row
    if b.row == a.row + 1:
        x, y = a.x + WIDTH / 2, a.y + HEIGHT
        u, v = b.x + WIDTH / 2, b.y
        shape = f"M{x:.0f} {y} C{x:.0f} {y + 20} {u:.0f} {v - 20} {u:.0f} {v}"
    else:
        # From side to side: forward on the right, back on the left.
        x, u = (a.x, b.x) if back else (a.x + WIDTH, b.x + WIDTH)
        y, v = a.y + HEIGHT / 2, b.y + HEIGHT / 2
        away = min(24 + 9 * abs(b.row - a.row), 170) * (-1 if back else 1)
        shape = f"M{x:.0f} {y} C{x + away:.0f} {y} {u + away:.0f} {v} {u:.0f} {v}"
    dash = _DASHED if back else ""
    return (
        f'<path d="{shape}" fill="none" stroke="{LINE}" '
        f'stroke-width="1.3"{dash}>{title}</path>'
    )


def _box(name: str, box: Box, group: Group | None, kept: int | None) -> str:
    x, y, middle = box.x, box.y, box.x + WIDTH / 2
    frame = f'x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
    if group is None:
        return (
            f'<rect {frame} fill="white" stroke="{LINE}" stroke-dasharray="2 2"/>'
            f'<text x="{middle:.0f}" y="{y + 22:.0f}" text-anchor="middle">'
            f"{name}</text>"
        )
    share = 1 if kept is None else kept / group.size
    count = f"{group.size}" if kept is None else f"{group.size} → {kept}"
    each = group.slots[0].indices.shape[1]
    unit = "channels" if each == 1 else f"sets of {each} channels"
    note = "" if group.exact else ", not exact"
    slots = "\n".join(f"{path_str(s.path)} axis {s.axis}" for s in group.slots)
    return (
        f"<g><title>{escape(name)}\n{escape(slots)}</title>"
        f'<rect {frame} fill="{FULL}"/>'
        f'<rect x="{x:.0f}" y="{y:.0f}" width="{share * WIDTH:.0f}" '
        f'height="{HEIGHT}" rx="4" fill="{KEPT}"/>'
        f'<text x="{middle:.0f}" y="{y + 15:.0f}" text-anchor="middle">'
        f"{escape(words.shorten(name, 30))}</text>"
        f'<text x="{middle:.0f}" y="{y + 30:.0f}" text-anchor="middle" '
        f'fill="#555555">{count} {unit}{note}</text></g>'
    )
