"""The shape of a training job's communication, and how far a placement spreads its groups.

A cell of the grid is one node. A row is a bundle of pipeline groups (all stages of one
node-replica), a column a bundle of data-parallel groups (all nodes of one pipeline stage); Arnold
(arXiv:2509.15940), section 5.1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PodGrid = npt.NDArray[np.int64]
"""The pod of each cell; shape (rows, columns), each entry an index into the capacities."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A grid of nodes that wants places in pods.

    Attributes:
        rows: node-replicas, ``m`` in the paper.
        columns: pipeline stages, ``n`` in the paper.
        capacities: free nodes of each pod.
    """

    rows: int
    columns: int
    capacities: tuple[int, ...]

    @property
    def cells(self) -> int:
        """Nodes that the job needs."""
        return self.rows * self.columns

    @property
    def classes(self) -> list[tuple[int, int]]:
        """The pods' capacities as far as they matter, with how many pods have each."""
        capped = (min(capacity, self.cells) for capacity in self.capacities if capacity > 0)
        return sorted(Counter(capped).items())

    @property
    def transposed(self) -> Demand:
        """The same demand with rows and columns swapped."""
        return Demand(self.columns, self.rows, self.capacities)


@dataclass(frozen=True, slots=True, order=True)
class Spread:
    """How many pods the widest groups touch.

    Attributes:
        pipeline: most pods of any row, ``R``.
        data: most pods of any column, ``C``.
    """

    pipeline: int
    data: int

    def weighted(self, alpha: float) -> float:
        """Arnold's objective (equation 2) with ``alpha`` as the data-parallel weight."""
        return alpha * self.data + (1 - alpha) * self.pipeline

    def dominates(self, other: Spread) -> bool:
        """Whether it is as good in both and differs."""
        return self != other and self.pipeline <= other.pipeline and self.data <= other.data

    @property
    def swapped(self) -> Spread:
        """The spread of the transposed grid."""
        return Spread(self.data, self.pipeline)


def distinct(lines: PodGrid) -> PodGrid:
    """How many different entries each line (first axis) of a grid has."""
    counts: PodGrid = np.count_nonzero(np.diff(np.sort(lines, axis=1), axis=1), axis=1) + 1
    return counts


def spread_of(grid: PodGrid) -> Spread:
    """Counts a grid's spreads, whatever made it."""
    return Spread(int(distinct(grid).max()), int(distinct(grid.T).max()))


def touches(grid: PodGrid) -> int:
    """Sum of all rows' and columns' spreads; breaks ties between equal widest groups."""
    return int(distinct(grid).sum() + distinct(grid.T).sum())


def fits(demand: Demand, grid: PodGrid) -> bool:
    """Whether a grid has the demand's shape and no pod holds more cells than it has nodes."""
    if grid.shape != (demand.rows, demand.columns) or int(grid.min()) < 0:
        return False
    used = np.bincount(grid.ravel(), minlength=len(demand.capacities))
    known = len(used) == len(demand.capacities)
    return known and bool(np.all(used <= np.array(demand.capacities)))


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """A placement that was built, with its spreads as counted."""

    grid: PodGrid
    spread: Spread
    method: str

    @classmethod
    def built(cls, demand: Demand, grid: PodGrid, method: str) -> Candidate | None:
        """The candidate of a grid, or None if it does not fit."""
        return cls(grid, spread_of(grid), method) if fits(demand, grid) else None

    @property
    def transposed(self) -> Candidate:
        """The same placement of the transposed demand."""
        return Candidate(self.grid.T, self.spread.swapped, self.method)


def pareto(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other dominates, one for each spread, by pipeline spread.

    Among equal spreads the one with the fewest touches stays; ties keep the first.
    """
    best: dict[Spread, Candidate] = {}
    for candidate in candidates:
        held = best.get(candidate.spread)
        if held is None or touches(candidate.grid) < touches(held.grid):
            best[candidate.spread] = candidate
    return [
        best[spread]
        for spread in sorted(best)
        if not any(other.dominates(spread) for other in best)
    ]
