"""How schedulers fill pods without looking at the grid: the orders in which nodes are taken.

Ranks are then numbered along the nodes taken, so a packing is a sequence of pods laid into the grid
row by row (``pp``: pipelines first) or column by column (``dp``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.placement.grid import Candidate, Demand, PodGrid

RankOrder = Literal["pp", "dp"]
RANK_ORDERS: tuple[RankOrder, ...] = ("pp", "dp")
_RANDOM_DRAWS = 5
Taken = npt.NDArray[np.int64]
"""The pod of each node taken, in the order of taking; shape (cells,)."""


def in_order(demand: Demand, pods: npt.NDArray[np.int64]) -> Taken | None:
    """Takes whole pods one after another; None where they do not hold the job."""
    capacities = np.array(demand.capacities, dtype=np.int64)
    taken = np.repeat(pods, capacities[pods])[: demand.cells]
    return taken if len(taken) == demand.cells else None


def gpu_packing(demand: Demand) -> Taken | None:
    """Fills the fullest pods first, as few as hold the job (Gandiva's packing, on pods)."""
    return in_order(demand, np.argsort(-np.array(demand.capacities), kind="stable"))


def best_fit(demand: Demand) -> Taken | None:
    """Takes the pod that leaves the least: the smallest that holds the rest, else the largest."""
    left = sorted((capacity, pod) for pod, capacity in enumerate(demand.capacities))
    need, order = demand.cells, []
    while need > 0 and left:
        fitting = next((i for i, (capacity, _) in enumerate(left) if capacity >= need), None)
        capacity, pod = left.pop(-1 if fitting is None else fitting)
        order.append(pod)
        need -= capacity
    return in_order(demand, np.array(order, dtype=np.int64)) if need <= 0 else None


def smallest_first(demand: Demand) -> Taken | None:
    """Takes the pods with the least remaining first, as a best-fit that goes node by node does."""
    return in_order(demand, np.argsort(np.array(demand.capacities), kind="stable"))


def leaf_order(demand: Demand) -> Taken | None:
    """Takes pod after pod in the network's order, as the vendors' sorters do."""
    return in_order(demand, np.arange(len(demand.capacities)))


def hostname_order(demand: Demand) -> Taken | None:
    """Takes nodes by their names as text, ``node10`` before ``node2``, as torchrun numbers them."""
    pods = np.repeat(np.arange(len(demand.capacities)), demand.capacities)
    if len(pods) < demand.cells:
        return None
    by_name = sorted(range(len(pods)), key=str)
    taken: Taken = pods[by_name[: demand.cells]]
    return taken


def stripe(demand: Demand) -> Taken | None:
    """Gives equal segments of whole rows to pods, as DLRover's node groups do."""
    capacities = np.array(demand.capacities, dtype=np.int64)
    for segments in range(1, demand.rows + 1):
        height = -(-demand.rows // segments)
        held = capacities // (height * demand.columns)
        if held.sum() >= -(-demand.rows // height):
            largest = np.argsort(-held, kind="stable")
            cells = np.repeat(largest, held[largest] * height * demand.columns)
            return np.array(cells[: demand.cells], dtype=np.int64)
    return None


def bipartition(demand: Demand, order: RankOrder) -> PodGrid | None:
    """Halves pods and grid together until each part has one pod (dual recursive bipartition).

    The pods are those that packing takes. A part of the grid is cut across its longer side, and
    across ``order``'s groups last where the sides are equal.
    """
    taken = gpu_packing(demand)
    if taken is None:
        return None
    grid = np.full((demand.rows, demand.columns), -1, dtype=np.int64)
    cells = np.stack(np.nonzero(grid < 0), axis=1)
    _halve(grid, cells, list(dict.fromkeys(taken.tolist())), demand.capacities, order)
    return grid


def _halve(
    grid: PodGrid,
    cells: npt.NDArray[np.int64],
    pods: Sequence[int],
    capacities: Sequence[int],
    order: RankOrder,
) -> None:
    if len(pods) == 1 or not len(cells):
        grid[cells[:, 0], cells[:, 1]] = pods[0]
        return
    halves = pods[::2], pods[1::2]
    room = [sum(capacities[pod] for pod in half) for half in halves]
    tall, wide = (len(np.unique(cells[:, axis])) for axis in (0, 1))
    by_row = tall > wide or (tall == wide and order == "pp")
    axis, line = (0, wide) if by_row else (1, tall)
    cells = cells[np.lexsort((cells[:, 1 - axis], cells[:, axis]))]
    lowest, highest = max(0, len(cells) - room[1]), min(len(cells), room[0])
    even = round(len(cells) * room[0] / sum(room) / line) * line
    first = even if lowest <= even <= highest else min(max(even, lowest), highest)
    _halve(grid, cells[:first], halves[0], capacities, order)
    _halve(grid, cells[first:], halves[1], capacities, order)


def random_fit(demand: Demand, seed: int) -> Taken | None:
    """Takes nodes from random pods, balanced: in turns over a random order of pods."""
    draw = np.random.default_rng(seed)
    left = np.array(demand.capacities)
    taken: list[int] = []
    while len(taken) < demand.cells and left.any():
        turn = draw.permutation(np.flatnonzero(left))
        taken += turn.tolist()
        left[turn] -= 1
    return np.array(taken[: demand.cells]) if len(taken) >= demand.cells else None


def laid(demand: Demand, taken: Taken, order: RankOrder) -> PodGrid:
    """The grid when ranks are numbered along the nodes taken."""
    if order == "pp":
        return taken.reshape(demand.rows, demand.columns)
    return taken.reshape(demand.columns, demand.rows).T


def random_grids(demand: Demand, seed: int, order: RankOrder) -> list[PodGrid]:
    """Those of some random fits, with seeds that follow one another."""
    draws = (random_fit(demand, seed + draw) for draw in range(_RANDOM_DRAWS))
    return [laid(demand, taken, order) for taken in draws if taken is not None]


PACKINGS: Mapping[str, Callable[[Demand], Taken | None]] = {
    "best-fit": best_fit,
    "smallest-first": smallest_first,
    "gpu-packing": gpu_packing,
    "leaf-order": leaf_order,
    "hostname-order": hostname_order,
    "dlrover-stripe": stripe,
}
"""What people use, each to be laid in either rank order."""


def packings(demand: Demand) -> Iterator[Candidate]:
    """The placements that people have without a planner, in both rank orders."""
    for name, pack in PACKINGS.items():
        taken = pack(demand)
        if taken is None:
            continue
        for order in RANK_ORDERS:
            yield from _named(demand, laid(demand, taken, order), f"{name} {order}")
    for order in RANK_ORDERS:
        grid = bipartition(demand, order)
        if grid is not None:
            yield from _named(demand, grid, f"topology-aware {order}")


def _named(demand: Demand, grid: PodGrid, name: str) -> Iterator[Candidate]:
    built = Candidate.built(demand, grid, name)
    if built is not None:
        yield built
