"""Blocks of nodes that pods should hold whole, and what is left where they cannot hold them all.

A block is the nodes of one tensor, context or expert group. A pod of 7 nodes holds one block of 4
whole, and 3 nodes of another. All pods together hold so many blocks whole and no more; where the
job has more blocks, the rest are put together of what is left in the pods. Then every pod that has
nodes for a whole block holds as many as it can, so that only their places in the grid are open:
blocks are searched for as elsewhere, with the pods that have the most left over rounded up, or with
all that is left over as a pod of its own, and the grids so found are improved by exchanges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trimtab.placement.certificate import Frontier
from trimtab.placement.config import Effort
from trimtab.placement.grid import Candidate, Demand, PodGrid, Spread, distinct, pareto
from trimtab.placement.search import Front, search

_SAME = 1e-9
_OPEN = -1
"""Of a cell that has no pod yet."""

_EXCHANGES = {"quick": 300, "full": 3000}
_MOST_COUNTED = 4_000_000
"""Cells counted for exchanges at most, so that large grids get fewer of them."""


@dataclass(frozen=True, slots=True)
class BlockFront:
    """Placements that split as few blocks as can be.

    Attributes:
        front: by nodes; its bound holds for all placements that split no more blocks.
        split: blocks that lie in more than one pod.
    """

    front: Front
    split: int


def fewest_split(demand: Demand, size: int) -> int | None:
    """How many blocks must be split; None where the pods do not hold the job.

    Args:
        demand: the job's grid and the pods by nodes.
        size: nodes of a block, neighbours in a column.
    """
    if sum(demand.capacities) < demand.cells:
        return None
    whole = sum(capacity // size for capacity in demand.capacities)
    return max(0, demand.cells // size - whole)


def search_blocks(
    demand: Demand, size: int, alpha: float, effort: Effort = "full"
) -> BlockFront | None:
    """The front of the placements that keep as many blocks whole as any.

    Args:
        demand: the job's grid and the pods by nodes; its rows are a multiple of the size.
        size: nodes of a block, neighbours in a column.
        alpha: the weight of columns.
        effort: of every search.

    Returns:
        None where the pods do not hold the job.
    """
    split = fewest_split(demand, size)
    if split is None:
        return None
    if split == 0:
        found = search(_in_blocks(demand, size, [0] * len(demand.capacities)), (alpha,), effort)
        assert found is not None  # since there is room
        candidates = tuple(_by_nodes(candidate, size) for candidate in found.candidates)
        return BlockFront(Front(candidates, found.bound), 0)
    loose = search(demand, (alpha,), effort)
    assert loose is not None
    if all(capacity < size for capacity in demand.capacities):
        return BlockFront(loose, split)
    bound = _tighter(loose.bound, _bound_by_blocks(demand, size, split, alpha, effort))
    improved = (
        _exchanged(demand, size, start, alpha, bound.least(alpha), effort)
        for start in _starts(demand, size, split, alpha, effort)
    )
    return BlockFront(Front(tuple(pareto(list(improved))), bound), split)


def _in_blocks(demand: Demand, size: int, more: list[int]) -> Demand:
    """A grid of blocks, and the pods with what they hold whole and some more."""
    pods = zip(demand.capacities, more, strict=True)
    room = tuple(capacity // size + extra for capacity, extra in pods)
    return Demand(demand.rows // size, demand.columns, room)


def _by_nodes(candidate: Candidate, size: int) -> Candidate:
    return Candidate(np.repeat(candidate.grid, size, axis=0), candidate.spread, candidate.method)


def _bound_by_blocks(
    demand: Demand, size: int, split: int, alpha: float, effort: Effort
) -> Frontier:
    """What the first node of every block says.

    These nodes are a placement of blocks by themselves, and spread no more. A pod has one for each
    block that it holds whole, and for split blocks no more than it has nodes left.
    """
    left = [min(capacity % size, split) for capacity in demand.capacities]
    found = search(_in_blocks(demand, size, left), (alpha,), effort)
    assert found is not None
    return found.bound


def _tighter(one: Frontier, other: Frontier) -> Frontier:
    """What either of two bounds says."""
    for pipeline, data in enumerate(other.least_data, 1):
        one = one.raised(pipeline, data)
    return one


def _starts(
    demand: Demand, size: int, split: int, alpha: float, effort: Effort
) -> Iterator[PodGrid]:
    """Grids by nodes with as many whole blocks as can be."""
    left = np.array([capacity % size for capacity in demand.capacities])
    rounded_up = np.argsort(-left, kind="stable")[:split]
    more = [0] * len(left)
    for pod in rounded_up.tolist():
        more[pod] = 1
    rounded = search(_in_blocks(demand, size, more), (alpha,), effort)
    for candidate in rounded.candidates if rounded is not None else ():
        grid = np.repeat(candidate.grid, size, axis=0)
        for pod in rounded_up.tolist():
            row, column = np.argwhere(candidate.grid == pod)[-1]
            grid[row * size + left[pod] : (row + 1) * size, column] = _OPEN
        yield _completed(demand, size, grid)
    whole = _in_blocks(demand, size, [0] * len(left))
    apart = search(Demand(whole.rows, whole.columns, (*whole.capacities, split)), (alpha,), effort)
    for candidate in apart.candidates if apart is not None else ():
        blocks = np.where(candidate.grid == len(left), _OPEN, candidate.grid)
        yield _completed(demand, size, np.repeat(blocks, size, axis=0))


def _completed(demand: Demand, size: int, grid: PodGrid) -> PodGrid:
    """Gives open cells what pods have left, first of pods that their columns and rows touch."""
    used = np.bincount(grid[grid >= 0], minlength=len(demand.capacities))
    left = np.array(demand.capacities) - used
    for row, column in np.argwhere(grid[::size] == _OPEN).tolist() + _partly_open(grid, size):
        cells = slice(row * size, (row + 1) * size)
        while (empty := np.flatnonzero(grid[cells, column] == _OPEN)).size:
            known = np.zeros(len(left))
            known[grid[:, column][grid[:, column] >= 0]] += 2
            known[np.unique(grid[cells][grid[cells] >= 0])] += 1
            fill = np.minimum(left, empty.size)
            pod = int(np.lexsort((-fill, -known * (left > 0), left == 0))[0])
            grid[empty[: fill[pod]] + row * size, column] = pod
            left[pod] -= fill[pod]
    return grid


def _partly_open(grid: PodGrid, size: int) -> list[list[int]]:
    """Blocks whose last cell is open and whose first is not."""
    found: list[list[int]] = np.argwhere(
        (grid[size - 1 :: size] == _OPEN) & (grid[::size] != _OPEN)
    ).tolist()
    return found


def _exchanged(
    demand: Demand, size: int, grid: PodGrid, alpha: float, least: float, effort: Effort
) -> Candidate:
    """The best grid on a seeded walk of exchanges that never makes it worse."""
    draw = random.Random(0)
    left = np.array(demand.capacities) - np.bincount(grid.ravel(), minlength=len(demand.capacities))
    score = _score(grid, alpha)
    for _ in range(min(_EXCHANGES[effort], math.ceil(_MOST_COUNTED / grid.size))):
        if score[0] <= least + _SAME:
            break
        changed = _changed(draw, grid, size, left)
        if changed is None:
            continue
        now = _score(changed[0], alpha)
        if now <= score:
            (grid, left), score = changed, now
    candidate = Candidate.built(demand, grid, "split blocks")
    assert candidate is not None
    return candidate


def _score(grid: PodGrid, alpha: float) -> tuple[float, float, int]:
    """The weighted spread, the share of lines that have it, and all lines' spreads together."""
    rows, columns = distinct(grid), distinct(grid.T)
    spread = Spread(int(rows.max()), int(columns.max()))
    widest = (rows == spread.pipeline).mean() + (columns == spread.data).mean()
    return round(spread.weighted(alpha), 9), float(widest), int(rows.sum() + columns.sum())


def _changed(
    draw: random.Random, grid: PodGrid, size: int, left: PodGrid
) -> tuple[PodGrid, PodGrid] | None:
    """The grid after an exchange of two blocks, of two cells of split blocks, or with what is left.

    None where it would change nothing.
    """
    blocks = grid.reshape(len(grid) // size, size, -1)
    kind = draw.randrange(3)
    if kind == 0:
        (a, b), (c, d) = (
            (draw.randrange(blocks.shape[0]), draw.randrange(blocks.shape[2])) for _ in range(2)
        )
        if (blocks[a, :, b] == blocks[c, :, d]).all():
            return None
        changed = blocks.copy()
        changed[a, :, b], changed[c, :, d] = blocks[c, :, d], blocks[a, :, b]
        return changed.reshape(grid.shape), left
    mixed = np.argwhere((blocks != blocks[:, :1]).any(axis=1))
    row, column = mixed[draw.randrange(len(mixed))].tolist()
    at = row * size + draw.randrange(size), column
    changed = grid.copy()
    if kind == 1:
        row, column = mixed[draw.randrange(len(mixed))].tolist()
        other = row * size + draw.randrange(size), column
        if grid[at] == grid[other]:
            return None
        changed[at], changed[other] = grid[other], grid[at]
        return changed, left
    spare = np.flatnonzero(left)
    if not spare.size:
        return None
    changed[at] = spare[draw.randrange(spare.size)]
    after = left.copy()
    after[grid[at]] += 1
    after[changed[at]] -= 1
    return changed, after
