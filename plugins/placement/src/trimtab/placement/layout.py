"""From pods to nodes: inside a pod, neighbours in the grid get neighbours in the network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from trimtab.placement.fabric import Place
from trimtab.placement.grid import PodGrid
from trimtab.placement.job import JobGrid

HostGrid = npt.NDArray[np.object_]
"""The node of each cell by its name; shape (rows, columns) of the job's grid."""


def lay_out(
    pods: Sequence[Sequence[Place]], grid: JobGrid, cells: PodGrid, alpha: float
) -> HostGrid:
    """Gives every cell a node of its pod.

    Args:
        pods: the nodes of each pod, those to take first first.
        grid: the job's grid.
        cells: the pod of each block; shape (rows / block, columns).
        alpha: the weight of columns, where rows and columns cannot both stay under one leaf.
    """
    hosts = np.empty((grid.rows, grid.columns), dtype=object)
    for pod in np.unique(cells):
        rows, columns = np.nonzero(cells == pod)
        order = np.lexsort((rows, columns)) if alpha >= 0.5 else np.lexsort((columns, rows))
        names = iter(place.name for place in pods[pod])
        for at in order:
            first = rows[at] * grid.block
            for row in range(first, first + grid.block):
                hosts[row, columns[at]] = next(names)
    return hosts
