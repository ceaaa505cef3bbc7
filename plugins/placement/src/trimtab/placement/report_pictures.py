"""The pictures of the report page, as SVG text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt

from trimtab.placement.fabric import Fabric, Place
from trimtab.placement.layout import HostGrid

Cell = tuple[int, int]
"""A node's row and column."""

FloatMatrix = npt.NDArray[np.float64]

_PALETTE = (
    "#4477d6", "#e8873a", "#3fa66b", "#c9518c", "#8a63c9", "#d3b32d", "#2fa5b8", "#a8694a",
    "#7d8b2b", "#e0625c", "#5a8fa8", "#b07fd6",
)  # fmt: skip
_Scale = Callable[[float], float]
_WIDTH = 1040.0
_MOST_SQUARES = 4000
"""Clusters of more nodes are drawn as one bar for each leaf."""


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name; past the palette's end, hues far from the ones before."""
    found = {}
    for index, name in enumerate(names):
        hue = (index * 137.508) % 360
        spare = f"hsl({hue:.0f} {55 if index % 2 else 70}% {46 + 10 * (index % 3)}%)"
        found[name] = _PALETTE[index] if index < len(_PALETTE) else spare
    return found


def matrix(hosts: HostGrid, domain_of: Mapping[str, str], colour: Mapping[str, str]) -> str:
    """The grid of nodes, each cell in its domain's colour.

    Args:
        hosts: the node of each cell; shape (rows, columns).
        domain_of: the domain of each node.
        colour: of each domain.
    """
    rows, columns = hosts.shape
    width, height = _pitch(columns, 460, 34), _pitch(rows, 460, 24)
    gap = 1.0 if min(width, height) > 4 else 0.0
    left, top = 34, 20
    parts = [
        f'<text x="{left}" y="12">stage 0 … {columns - 1}</text>',
        f'<text x="0" y="{top + 10}">0</text>',
        f'<text x="0" y="{top + height * rows:.1f}">{rows - 1}</text>' if rows > 1 else "",
    ]
    for row in range(rows):
        for column in range(columns):
            node = str(hosts[row, column])
            domain = domain_of[node]
            parts.append(
                _square(
                    left + column * width,
                    top + row * height,
                    width - gap,
                    height - gap,
                    colour[domain],
                    (row, column),
                    f"{node} in {domain}",
                )
            )
    return _svg(left + columns * width, top + rows * height + 2, parts, "cells")


def between_picture(
    between: FloatMatrix, names: Sequence[str], most: float, shown: Callable[[float], str]
) -> str:
    """Bytes from each domain (row) to each other one (column), the darker the more.

    Args:
        between: bytes a step; the diagonal is what stays inside and is not drawn.
        names: of the domains.
        most: bytes of the darkest cell.
        shown: bytes as text.
    """
    count = len(names)
    pitch = _pitch(count, 460, 64)
    gap = 1.0 if pitch > 4 else 0.0
    labelled = pitch >= 12
    left, top = (98.0, 20.0) if labelled else (4.0, 4.0)
    parts = []
    if labelled:
        parts += [
            f'<text x="{left - 6}" y="{top + (row + 0.5) * pitch + 4:.1f}" text-anchor="end">'
            f"{escape(_short(name))}</text>"
            for row, name in enumerate(names)
        ]
        parts.append(f'<text x="{left}" y="12">to the same, in this order</text>')
    for row, column in np.ndindex(count, count):
        value = float(between[row, column])
        x, y = left + column * pitch, top + row * pitch
        box = f'x="{x:.1f}" y="{y:.1f}" width="{pitch - gap:.1f}" height="{pitch - gap:.1f}"'
        if row == column or not value:
            # A picture of hundreds of domains is mostly empty: what says nothing is left out.
            if labelled:
                parts.append(f'<rect class="idle" {box}/>')
            continue
        opacity = 0.12 + 0.88 * value / most
        title = f"{names[row]} to {names[column]}: {shown(value)}"
        parts.append(
            f'<rect class="flow" {box} fill="var(--accent)" fill-opacity="{opacity:.2f}">'
            f"<title>{escape(title)}</title></rect>"
        )
        if pitch >= 56:
            tone = "on-dark" if opacity > 0.55 else "strong"
            parts.append(
                f'<text class="{tone}" x="{x + pitch / 2:.1f}" y="{y + pitch / 2 + 4:.1f}" '
                f'text-anchor="middle">{escape(shown(value))}</text>'
            )
    return _svg(left + count * pitch, top + count * pitch + 2, parts, "bytes")


def _pitch(count: int, room: float, most: float) -> float:
    # Whole pixels where there are enough, so that no seams show.
    pitch = min(room / count, most)
    return float(int(pitch)) if pitch >= 2 else max(pitch, 0.2)


def _square(
    x: float, y: float, width: float, height: float, fill: str, cell: Cell, title: str
) -> str:
    return (
        f'<rect class="cell" data-r="{cell[0]}" data-c="{cell[1]}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{width:.1f}" height="{height:.1f}" fill="{fill}"><title>{escape(title)}, '
        f"row {cell[0]}, stage {cell[1]}</title></rect>"
    )


def _svg(width: float, height: float, parts: Sequence[str], kind: str = "") -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg class="{kind}" role="img" {size}>{"".join(parts)}</svg>'


def tree_picture(
    fabric: Fabric, cells: Mapping[str, Cell], tier: int, colour: Mapping[str, str]
) -> str:
    """The network as a tree: the core, the widest domains, and their leaves with their nodes.

    Args:
        fabric: the network.
        cells: the row and column of each node that has a rank.
        tier: the domains that are coloured.
        colour: of each domain that has a rank.
    """
    boxes = _nested(fabric)
    side = _side(len(fabric.places))
    drawn = [_Box(name, leaves, side, cells, tier, colour) for name, leaves in boxes.items()]
    rows = _flowed(drawn)
    parts: list[str] = []
    y = 74.0
    for row in rows:
        x = (_WIDTH - sum(box.width + 14 for box in row) + 14) / 2
        for box in row:
            middle = x + box.width / 2
            parts.append(
                f'<path class="cable" d="M{_WIDTH / 2} 34 C{_WIDTH / 2} {y - 24:.1f} '
                f'{middle:.1f} 44 {middle:.1f} {y:.1f}"/>'
                if row is rows[0]
                else f'<path class="cable" d="M{middle:.1f} {y - 12:.1f} V{y:.1f}"/>'
            )
            parts.append(box.drawn(x, y))
            x += box.width + 14
        y += max(box.height for box in row) + 22
    core = (
        f'<rect class="box" x="{_WIDTH / 2 - 48}" y="8" width="96" height="26" rx="6"/>'
        f'<text class="strong" x="{_WIDTH / 2}" y="25" text-anchor="middle">core</text>'
    )
    return _svg(_WIDTH, y, [*parts, core], "cells")


def _nested(fabric: Fabric) -> dict[str, dict[str, list[Place]]]:
    """Nodes by their widest and then their narrowest domain."""
    found: dict[str, dict[str, list[Place]]] = {}
    for place in fabric.places:
        path = place.path or ("network",)
        leaves = found.setdefault(path[0], {})
        leaves.setdefault(path[-1] if len(path) > 1 else "", []).append(place)
    return found


def _side(nodes: int) -> float:
    """The size of a node's square; 0 where nodes are too many to be drawn."""
    if nodes > _MOST_SQUARES:
        return 0.0
    return 18.0 if nodes <= 64 else 13.0 if nodes <= 320 else 9.0 if nodes <= 1600 else 6.0


class _Box:
    """A widest domain with its leaves side by side."""

    def __init__(
        self,
        name: str,
        leaves: Mapping[str, Sequence[Place]],
        side: float,
        cells: Mapping[str, Cell],
        tier: int,
        colour: Mapping[str, str],
    ) -> None:
        self._name, self._leaves, self._side = name, leaves, side
        self._cells, self._tier, self._colour = cells, tier, colour
        most = max(len(places) for places in leaves.values())
        alone = len(leaves) == 1
        self._across = max(1, math.ceil(math.sqrt(most * (1.6 if alone else 0.6))))
        deep = math.ceil(most / self._across)
        self._leaf_width = self._across * side if side else 10.0
        self._leaf_height = deep * side if side else 46.0
        self._per_line = min(len(leaves), max(1, int(960 // (self._leaf_width + 8))))
        if not alone:
            square = math.ceil(math.sqrt(len(leaves) * 1.8))
            self._per_line = min(self._per_line, max(square, 1))
        lines = math.ceil(len(leaves) / self._per_line)
        self._line = self._leaf_height + 8
        self.width = max(self._per_line * (self._leaf_width + 8) + 12, 84.0)
        self.height = 30 + lines * self._line + 4

    def drawn(self, x: float, y: float) -> str:
        """The box with its upper left corner at a place."""
        used = sum(place.name in self._cells for leaf in self._leaves.values() for place in leaf)
        total = sum(map(len, self._leaves.values()))
        parts = [
            f'<rect class="box" x="{x:.1f}" y="{y:.1f}" width="{self.width:.1f}" '
            f'height="{self.height:.1f}" rx="6"/>',
            f'<text class="strong" x="{x + 8:.1f}" y="{y + 17:.1f}">{escape(_short(self._name))}'
            f'</text><text x="{x + self.width - 8:.1f}" y="{y + 17:.1f}" text-anchor="end">'
            f"{used}/{total}</text>",
        ]
        for index, (name, places) in enumerate(self._leaves.items()):
            line, column = divmod(index, self._per_line)
            at_x = x + 10 + column * (self._leaf_width + 8)
            parts.append(self._leaf(name, places, at_x, y + 26 + line * self._line))
        return "".join(parts)

    def _leaf(self, name: str, places: Sequence[Place], x: float, y: float) -> str:
        outline = (
            f'<rect class="box" x="{x - 2:.1f}" y="{y - 2:.1f}" width="{self._leaf_width + 3:.1f}" '
            f'height="{self._leaf_height + 3:.1f}" rx="2"><title>{escape(name)}</title></rect>'
            if name
            else ""
        )
        if not self._side:
            return outline + self._bar(name, places, x, y)
        squares = []
        for index, place in enumerate(places):
            down, along = divmod(index, self._across)
            squares.append(self._node(place, x + along * self._side, y + down * self._side))
        return outline + "".join(squares)

    def _node(self, place: Place, x: float, y: float) -> str:
        size = self._side - 1.5
        cell = self._cells.get(place.name)
        if cell is None:
            return (
                f'<rect class="idle" x="{x:.1f}" y="{y:.1f}" width="{size}" height="{size}">'
                f"<title>{escape(place.name)}, no rank</title></rect>"
            )
        return _square(x, y, size, size, self._fill(place), cell, place.name)

    def _fill(self, place: Place) -> str:
        name = place.path[self._tier] if self._tier < len(place.path) else "network"
        return self._colour[name]

    def _bar(self, name: str, places: Sequence[Place], x: float, y: float) -> str:
        """How much of a leaf has ranks."""
        used = [place for place in places if place.name in self._cells]
        height = self._leaf_height * len(used) / len(places)
        fill = self._fill(used[0]) if used else "none"
        return (
            f'<rect class="idle" x="{x:.1f}" y="{y:.1f}" width="{self._leaf_width - 1:.1f}" '
            f'height="{self._leaf_height - 1:.1f}"/><rect x="{x:.1f}" '
            f'y="{y + self._leaf_height - height:.1f}" width="{self._leaf_width - 1:.1f}" '
            f'height="{max(height - 1, 0):.1f}" fill="{fill}"><title>{escape(name)}: '
            f"{len(used)} of {len(places)} nodes</title></rect>"
        )


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:6]}…{name[-6:]}"


def _flowed(boxes: Sequence[_Box]) -> list[list[_Box]]:
    """Boxes in rows no wider than the picture."""
    rows: list[list[_Box]] = [[]]
    width = 0.0
    for box in boxes:
        if rows[-1] and width + box.width > _WIDTH:
            rows.append([])
            width = 0.0
        rows[-1].append(box)
        width += box.width + 14
    return rows


def front_picture(
    points: Sequence[tuple[int, int]],
    *,
    chosen: tuple[int, int],
    before: tuple[int, int],
    bound: Sequence[int | None],
    domains: str,
) -> str:
    """The Pareto front with the chosen point, the bound, and where hostname order lies.

    Args:
        points: pipeline and data spread of each placement.
        chosen: the plan's.
        before: of hostname order.
        bound: for each pipeline spread from 1 on, the least data spread of any placement.
        domains: what spreads count.
    """
    every = [*points, chosen, before]
    most_x, most_y = (max(point[axis] for point in every) + 1 for axis in (0, 1))
    left, top, width, height = 52.0, 14.0, 620.0, 260.0

    def x(value: float) -> float:
        return left + width * (value - 0.5) / (most_x - 0.5)

    def y(value: float) -> float:
        return top + height * (1 - (value - 0.5) / (most_y - 0.5))

    parts = [_impossible(bound, most_x, most_y, x, y), _axes(most_x, most_y, x, y, domains)]
    for point in sorted(set(points)):
        radius, style = (7, 'fill="var(--accent)"') if point == chosen else (5, _HOLLOW)
        parts.append(
            f'<circle class="point" cx="{x(point[0]):.1f}" cy="{y(point[1]):.1f}" r="{radius}" '
            f"{style}><title>pipeline {point[0]}, data {point[1]}</title></circle>"
            f'<text x="{x(point[0]) + 10:.1f}" y="{y(point[1]) - 8:.1f}">'
            f"({point[0]}, {point[1]})</text>"
        )
    side = f'x="{x(before[0]) - 5:.1f}" y="{y(before[1]) - 5:.1f}" width="10" height="10"'
    parts.append(
        f'<rect class="before" {side} fill="none" stroke="#d98a00" stroke-width="2"/>'
        f'<text x="{x(before[0]) - 10:.1f}" y="{y(before[1]) + 4:.1f}" text-anchor="end">'
        f"by hostname ({before[0]}, {before[1]})</text>"
    )
    return _svg(left + width + 60, top + height + 44, parts)


_HOLLOW = 'fill="var(--paper)" stroke="var(--accent)" stroke-width="2"'


def _impossible(bound: Sequence[int | None], most_x: int, most_y: int, x: _Scale, y: _Scale) -> str:
    """What no placement reaches: below the bound of each pipeline spread."""
    parts = []
    for spread in range(1, most_x + 1):
        least = bound[min(spread, len(bound)) - 1] if bound else 1
        top = most_y if least is None else min(least, most_y)
        if top > 1:
            start, end = x(spread - 0.5), x(min(spread + 0.5, most_x))
            upper, lower = y(top - 0.5), y(0.5)
            parts.append(
                f'<rect class="impossible" x="{start:.1f}" y="{upper:.1f}" '
                f'width="{max(end - start, 0):.1f}" height="{lower - upper:.1f}" '
                f'fill="var(--idle)"/>'
            )
    return "".join(parts)


def _axes(most_x: int, most_y: int, x: _Scale, y: _Scale, domains: str) -> str:
    parts = [
        f'<path class="cable" d="M{x(0.5):.1f} {y(most_y):.1f} V{y(0.5):.1f} H{x(most_x):.1f}"/>',
        f'<text x="{x(most_x):.1f}" y="{y(0.5) + 34:.1f}" text-anchor="end">'
        f"{escape(domains)} of the widest pipeline group</text>",
        f'<text transform="translate(14 {y(0.5):.1f}) rotate(-90)">'
        f"{escape(domains)} of the widest data parallel group</text>",
    ]
    parts += [
        f'<text x="{x(value):.1f}" y="{y(0.5) + 16:.1f}" text-anchor="middle">{value}</text>'
        for value in range(1, most_x, max(1, most_x // 16))
    ]
    parts += [
        f'<text x="{x(0.5) - 8:.1f}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>'
        for value in range(1, most_y, max(1, most_y // 12))
    ]
    return "".join(parts)
