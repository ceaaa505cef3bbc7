"""How schedulers fill pods without looking at the grid: the orders in which nodes are taken.

Ranks are then numbered along the nodes taken, so a packing is a sequence of pods laid into the grid
row by row (``pp``: pipelines first) or column by column (``dp``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimtab.placement.grid import Candidate, Demand, PodGrid

RankOrder = Literal["pp", "dp"]
RANK_ORDERS: tuple[RankOrder, ...] = ("pp", "dp")
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


def hostname_order(demand: Demand, seed: int) -> Taken | None:
    """Takes nodes by name where names say nothing of the network: in a random order of all nodes.

    This is torchrun's order on a cluster whose names were given by another rule.
    """
    nodes = np.repeat(np.arange(len(demand.capacities)), demand.capacities)
    if len(nodes) < demand.cells:
        return None
    return np.random.default_rng(seed).permutation(nodes)[: demand.cells]


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


def packings(demand: Demand) -> Iterator[Candidate]:
    """The packings that are worth a look, in both rank orders."""
    for name, pack in (
        ("gpu-packing", gpu_packing),
        ("best-fit", best_fit),
        ("smallest first", smallest_first),
        ("leaf order", leaf_order),
    ):
        taken = pack(demand)
        if taken is not None:
            for order in RANK_ORDERS:
                built = Candidate.built(demand, laid(demand, taken, order), f"{name} {order}")
                if built is not None:
                    yield built
