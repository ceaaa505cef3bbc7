"""Pictures of a plan: what each step sends, and how long it keeps each link busy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trimtab.core.collectives import UNIT, NetworkTree, Step
from trimtab.core.cost import ExchangeCost

MOST_CELLS = 64
"""Among more ranks, neighbours share a cell of the picture of messages."""

_MATRIX = 156.0
_TREE_WIDTH, _TIER_HEIGHT = 320.0, 46.0

Floats = NDArray[np.float64]


def messages_picture(step: Step, leaves: int) -> str:
    """Who sends how much to whom: a row for each sender and a column for each receiver.

    Args:
        step: among the leaves of a network, in their order.
        leaves: how many there are.
    """
    cells = min(leaves, MOST_CELLS)
    sent = np.zeros((cells, cells))
    for source, to, size in _messages(step):
        sent[source * cells // leaves, to * cells // leaves] += size
    side = _MATRIX / cells
    most = max(float(sent.max()), 1e-30)
    parts = [
        f'<rect class="frame" x="0" y="0" width="{_MATRIX:.0f}" height="{_MATRIX:.0f}"/>',
        *(
            f'<rect class="sent" x="{to * side:.2f}" y="{source * side:.2f}" '
            f'width="{side * 0.94:.2f}" height="{side * 0.94:.2f}" '
            f'fill-opacity="{0.15 + 0.85 * sent[source, to] / most:.2f}"><title>'
            f"{sent[source, to]:.3%} of the payload</title></rect>"
            for source, to in np.argwhere(sent).tolist()
        ),
    ]
    return _svg(_MATRIX, _MATRIX, parts)


def _messages(step: Step) -> list[tuple[int, int, float]]:
    """Sender, receiver and share of the payload of each message of all rounds of a step."""
    found: list[tuple[int, int, float]] = []
    members: dict[int, list[int]] = {}
    for group, rank in zip(step.sender_group.tolist(), step.sender.tolist(), strict=True):
        members.setdefault(group, []).append(rank)
    parts = zip(
        step.owner_group.tolist(),
        step.owner.tolist(),
        ((step.end - step.begin) / UNIT).tolist(),
        strict=True,
    )
    for group, owner, size in parts:
        senders = members[group]
        if step.ring[group]:
            # Each part passes every link of the ring but the one out of its owner.
            place = senders.index(owner)
            around = [senders[(place + 1 + i) % len(senders)] for i in range(len(senders))]
            found += [(source, to, size) for source, to in pairwise(around)]
        else:
            found += [(sender, owner, size) for sender in senders if sender != owner]
    return found


def links_picture(tree: NetworkTree, cost: ExchangeCost) -> str:
    """The network with each link as wide as it is busy, against the busiest of the step."""
    busy = np.maximum(cost.up_busy, cost.down_busy)
    most = max(float(busy.max()), 1e-30)
    places = _places(tree)
    parts = []
    for point, parent in enumerate(tree.parents):
        if parent < 0:
            continue
        (x1, y1), (x2, y2) = places[point], places[parent]
        share = float(busy[point]) / most
        parts.append(
            f'<line class="{"hot" if share > 0.99 else "link"}" x1="{x1:.1f}" y1="{y1:.1f}" '
            f'x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{0.4 + 4.6 * share:.2f}" '
            f'stroke-opacity="{0.25 + 0.75 * share:.2f}"><title>{escape(tree.names[point])}: '
            f"{share:.0%} of the busiest link</title></line>"
        )
    parts += [
        f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="{2.2 if tree.children[p] else 1.4}"/>'
        for p, (x, y) in places.items()
    ]
    height = max(y for _, y in places.values()) + 8
    return _svg(_TREE_WIDTH, height, parts)


def _places(tree: NetworkTree) -> Mapping[int, tuple[float, float]]:
    """Where each point is drawn: leaves side by side, the others above the middle of theirs."""
    depth = [0] * len(tree.names)
    for point, parent in enumerate(tree.parents):
        if parent >= 0:
            depth[point] = depth[parent] + 1
    step = (_TREE_WIDTH - 16) / max(tree.size - 1, 1)
    return {
        point: (8 + step * (first + last - 1) / 2, 8 + _TIER_HEIGHT * depth[point])
        for point, (first, last) in enumerate(tree.spans)
    }


def sizes_picture(lines: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Figures over sizes, both axes logarithmic; a line for each name, the first one strong."""
    drawn = {
        name: kept for name, line in lines.items() if (kept := [p for p in line if min(p) > 0])
    }
    points = [point for line in drawn.values() for point in line]
    if len({size for size, _ in points}) < 2:
        return ""
    logs = np.log10(np.array(points))
    low, high = logs.min(axis=0), logs.max(axis=0)
    span = np.maximum(high - low, 1e-9)
    width, height, left, top = 560.0, 240.0, 12.0, 10.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x, y = (np.log10(np.array(point)) - low) / span
        return left + width * float(x), top + height * (1 - float(y))

    parts, next_y = [], -1e9
    for name, line in sorted(drawn.items(), key=lambda item: place(item[1][-1])[1]):
        kind = "ours" if name == next(iter(lines)) else "bound" if name == "bound" else "other"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        x, y = place(line[-1])
        next_y = max(y + 4, next_y + 13)
        label = f"{name} {line[-1][1]:.2f}×"
        parts.append(f'<text x="{x + 6:.1f}" y="{next_y:.1f}">{escape(label)}</text>')
    return _svg(left + width + 190, max(top + height + 12, next_y + 8), parts)


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    return f'<svg role="img" {size}>{"".join(parts)}</svg>'
