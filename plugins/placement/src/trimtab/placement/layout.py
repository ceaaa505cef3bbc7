"""From pods to nodes: inside a pod, neighbours in the grid get neighbours in the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.placement.fabric import Place, domains
from trimtab.placement.grid import Demand, PodGrid
from trimtab.placement.job import JobGrid
from trimtab.placement.search import quick_search

HostGrid = npt.NDArray[np.object_]
"""The node of each cell by its name; shape (rows, columns) of the job's grid."""


def lay_out(
    pods: Sequence[Sequence[Place]], tier: int, grid: JobGrid, cells: PodGrid, alpha: float
) -> HostGrid:
    """Gives every cell a node of its pod.

    Args:
        pods: the nodes of each pod, those to take first first.
        tier: of the pods; the tiers below it are laid out in the same way.
        grid: the job's grid.
        cells: the pod of each block; shape (rows / block, columns).
        alpha: the weight of columns, where rows and columns cannot both stay under one leaf.
    """
    hosts = np.empty((grid.rows, grid.columns), dtype=object)
    for pod in np.unique(cells):
        rows, columns = np.nonzero(cells == pod)
        for row, column, places in _shared_out(rows, columns, pods[pod], tier, grid.block, alpha):
            first = row * grid.block
            hosts[first : first + grid.block, column] = [place.name for place in places]
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
    deepest = all(len(place.path) <= tier + 1 for place in places)
    below = None if deepest else _below(rows, columns, places, tier, block, alpha)
    if below is not None:
        return below
    order = np.lexsort((rows, columns)) if alpha >= 0.5 else np.lexsort((columns, rows))
    return [
        (int(rows[at]), int(columns[at]), places[turn * block : (turn + 1) * block])
        for turn, at in enumerate(order)
    ]


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
