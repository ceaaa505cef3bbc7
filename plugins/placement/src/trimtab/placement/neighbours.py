"""Rows and columns in an order in which neighbours share pods.

Which rows and columns there are decides how many pods groups touch; in what order they come does
not. But stages send to the next stage, and rings go from row to row: so rows and columns are put
beside those that differ from them in few pods.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trimtab.placement.grid import PodGrid

_MOST_KINDS = 2000
"""Different rows up to which an order is looked for."""


def crossings(grid: PodGrid) -> int:
    """Neighbours in different pods: of stages, and of rings over the rows of a column."""
    stages = np.count_nonzero(grid[:, 1:] != grid[:, :-1])
    return int(stages + np.count_nonzero(grid != np.roll(grid, -1, axis=0)))


def beside_their_like(grid: PodGrid) -> PodGrid:
    """The rows and columns of a grid in another order, if that has fewer crossings."""
    columns = grid[:, _chain(grid.T)]
    turned = columns[_chain(columns)]
    rows = grid[_chain(grid)]
    return min((grid, rows, turned), key=crossings)


def _chain(lines: PodGrid) -> npt.NDArray[np.int64]:
    """An order of lines in which the next is always the one most like the last.

    Equal lines stay together.
    """
    kinds, kind = np.unique(lines, axis=0, return_inverse=True)
    if len(kinds) > _MOST_KINDS:
        return np.arange(len(lines))
    at = int(kind.ravel()[0])
    place, left = np.zeros(len(kinds), dtype=np.int64), np.ones(len(kinds), dtype=bool)
    for step in range(len(kinds)):
        place[at], left[at] = step, False
        if left.any():
            apart = np.count_nonzero(kinds != kinds[at], axis=1)
            at = int(np.argmin(np.where(left, apart, lines.shape[1] + 1)))
    return np.argsort(place[kind.ravel()], kind="stable")
