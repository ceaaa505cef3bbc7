"""From pods to nodes: inside a pod, neighbours in the grid get neighbours in the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.placement.fabric import Place, domains
from trimtab.placement.grid import Demand, PodGrid
from trimtab.placement.search import quick_search

HostGrid = npt.NDArray[np.object_]
"""The node of each cell by its name; shape (rows, columns) of the job's grid."""


def lay_out(
    pods: Sequence[Sequence[Place]], tier: int, block: int, cells: PodGrid, alpha: float
) -> HostGrid:
    """Gives every cell a node of its pod.

    Args:
        pods: the nodes of each pod, those to take first first.
        tier: of the pods; the tiers below it are laid out in the same way.
        block: neighbouring cells of a column that belong together.
        cells: the pod of each cell.
        alpha: the weight of columns, where rows and columns cannot both stay under one leaf.
    """
    hosts = np.empty(cells.shape, dtype=object)
    in_blocks = cells.reshape(len(cells) // block, block, -1)
    whole = (in_blocks == in_blocks[:, :1]).all(axis=1)
    in_whole = np.repeat(whole, block, axis=0)
    for pod in np.unique(cells):
        rows, columns = np.nonzero(whole & (in_blocks[:, 0] == pod))
        given: set[str] = set()
        for row, column, places in _shared_out(rows, columns, pods[pod], tier, block, alpha):
            names = [place.name for place in places]
            hosts[row * block : (row + 1) * block, column] = names
            given.update(names)
        rest = [place for place in pods[pod] if place.name not in given]
        rows, columns = np.nonzero((cells == pod) & ~in_whole)
        for row, column, places in _shared_out(rows, columns, rest, tier, 1, alpha):
            hosts[row, column] = places[0].name
    return hosts


_Cell = tuple[int, int, Sequence[Place]]
"""A block's row and column, and its nodes."""


def _shared_out(
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    places: Sequence[Place],
    tier: int,
    block: int,
    alpha: float,
) -> list[_Cell]:
    """Shares the nodes of one domain out to its cells."""
    if not len(rows):
        return []
    deepest = all(len(place.path) <= tier + 1 for place in places)
    below = None if deepest else _below(rows, columns, places, tier, block, alpha)
    if below is not None:
        return below
    order = np.lexsort((rows, columns)) if alpha >= 0.5 else np.lexsort((columns, rows))
    blocks, _ = _cut(places, tier + 1, block)
    return [(int(rows[at]), int(columns[at]), blocks[turn]) for turn, at in enumerate(order)]


def _below(
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    places: Sequence[Place],
    tier: int,
    block: int,
    alpha: float,
) -> list[_Cell] | None:
    """Cells that fill a rectangle are a demand on the domains of the next tier.

    Others are left to the order of cells; so is what does not fit.
    """
    tall, wide = np.unique(rows), np.unique(columns)
    if len(tall) * len(wide) != len(rows):
        return None
    inner = list(domains(places, tier + 1).values())
    room = tuple(len(nodes) // block for nodes in inner)
    front = quick_search(Demand(len(tall), len(wide), room))
    if front is None:
        return None
    cells = front.best(alpha).grid
    found: list[_Cell] = []
    for domain, nodes in enumerate(inner):
        at_rows, at_columns = np.nonzero(cells == domain)
        if len(at_rows):
            inside = tall[at_rows], wide[at_columns]
            found += _shared_out(*inside, nodes, tier + 1, block, alpha)
    return found


def _cut(
    places: Sequence[Place], tier: int, block: int
) -> tuple[list[Sequence[Place]], list[Place]]:
    """Cuts nodes into blocks, as many as can be inside one domain, and what is left over."""
    blocks: list[Sequence[Place]] = []
    left = list(places)
    if any(len(place.path) > tier for place in places):
        left = []
        for nodes in domains(places, tier).values():
            inside, over = _cut(nodes, tier + 1, block)
            blocks += inside
            left += over
    turns = len(left) // block
    blocks += [left[turn * block : (turn + 1) * block] for turn in range(turns)]
    return blocks, left[turns * block :]
