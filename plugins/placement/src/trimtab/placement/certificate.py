"""What no placement can beat: a bound from counting, whatever the placement looks like.

A pod whose cells lie in ``a`` rows and ``b`` columns holds at most ``min(capacity, a b)`` of them.
If every row touches at most ``R`` pods and every column at most ``C``, the pods' ``a`` sum to at
most ``R`` times the rows and their ``b`` to at most ``C`` times the columns. The fewest columns to touch
for given rows to touch is a linear programme, or with whole columns a small integer one.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from trimtab.placement.grid import Demand, Spread

_SLACK = 1e-6
"""Solvers' rounding; a bound is lowered by it before it is rounded up."""


@dataclass(frozen=True, slots=True)
class Frontier:
    """For each pipeline spread from 1 on, the data spread that no placement goes below.

    Attributes:
        least_data: entry ``i`` is for pipeline spread ``i + 1``; None where no placement has it.
    """

    least_data: tuple[int | None, ...]

    def allows(self, spread: Spread) -> bool:
        """Whether the bound leaves room for a spread."""
        least = self.least_data[min(spread.pipeline, len(self.least_data)) - 1]
        return least is not None and least <= spread.data

    def least(self, alpha: float) -> float:
        """The weighted spread that no placement goes below."""
        return min(
            Spread(index + 1, data).weighted(alpha)
            for index, data in enumerate(self.least_data)
            if data is not None
        )


def _classes(demand: Demand) -> list[tuple[int, int]]:
    """The capacities that matter, with their numbers."""
    capped = (min(capacity, demand.cells) for capacity in demand.capacities if capacity > 0)
    return sorted(Counter(capped).items())


def _least_columns(demand: Demand, pipeline: int, seconds: float) -> float | None:
    """Fewest pod-columns that hold all cells when rows touch ``pipeline`` pods each.

    Variables, for each capacity and each number of columns ``b``: how many of its pods touch ``b``
    columns, and the rows that these touch together.
    """
    choices = [
        (capacity, number, b)
        for capacity, number in _classes(demand)
        for b in range(1, demand.columns + 1)
        # More columns than cells are never touched.
        if b <= capacity
    ]
    size = len(choices)
    capacity, number, columns = (
        np.array(column, dtype=float) for column in zip(*choices, strict=True)
    )
    # Three blocks: pods z, rows a, cells x.
    eye, zero = np.eye(size), np.zeros((size, size))
    constraints = [
        LinearConstraint(np.hstack([zero, -np.diag(columns), eye]), -np.inf, 0),
        LinearConstraint(np.hstack([-np.diag(capacity), zero, eye]), -np.inf, 0),
        LinearConstraint(np.hstack([-demand.rows * eye, eye, zero]), -np.inf, 0),
        LinearConstraint(
            np.concatenate([np.zeros(size), np.ones(size), np.zeros(size)]),
            -np.inf,
            demand.rows * pipeline,
        ),
        LinearConstraint(np.concatenate([np.zeros(2 * size), np.ones(size)]), demand.cells, np.inf),
    ]
    for value, count in _classes(demand):
        same = np.concatenate([capacity == value, np.zeros(2 * size)]).astype(float)
        constraints.append(LinearConstraint(same, -np.inf, count))
    upper = np.concatenate([number, np.full(size, np.inf), np.full(size, np.inf)])
    solved = milp(
        np.concatenate([columns, np.zeros(2 * size)]),
        constraints=constraints,
        bounds=Bounds(0, upper),
        integrality=np.concatenate([np.full(size, float(seconds > 0)), np.zeros(2 * size)]),
        options={"time_limit": seconds} if seconds > 0 else {},
    )
    if solved.status == 2:
        return None
    bound = solved.mip_dual_bound if seconds > 0 else solved.fun
    return 0.0 if bound is None else float(bound)


def fewest_pods(demand: Demand) -> int | None:
    """Fewest pods that hold all rows whole; None where they do not.

    With pipeline spread 1 every column visits every pod in use, so this is its data spread.
    """
    held = 0
    for number, capacity in enumerate(sorted(demand.capacities, reverse=True), 1):
        held += capacity // demand.columns
        if held >= demand.rows:
            return number
    return None


def _least_data(demand: Demand, pipeline: int, seconds: float) -> int | None:
    if pipeline == 1:
        return fewest_pods(demand)
    columns = _least_columns(demand, pipeline, seconds)
    if columns is None:
        return None
    whole = fewest_pods(demand.transposed)
    least = 1 if whole is not None and pipeline >= whole else 2
    return max(least, math.ceil(columns / demand.columns - _SLACK))


def frontier(demand: Demand, *, whole_columns_within_s: float = 0.0) -> Frontier:
    """The bound for every pipeline spread that can occur.

    Args:
        demand: the job's grid and the pods' free nodes.
        whole_columns_within_s: seconds for each spread's integer programme; 0 solves the linear
            one, which is a little weaker and much quicker.
    """
    most = min(demand.columns, sum(1 for capacity in demand.capacities if capacity))
    return Frontier(
        tuple(_least_data(demand, r, whole_columns_within_s) for r in range(1, most + 1))
    )
