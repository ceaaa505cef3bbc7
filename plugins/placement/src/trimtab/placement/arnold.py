"""Arnold's own placement (arXiv:2509.15940): its integer programme as published, and a closed form.

The programme's unit is a pipeline group: a row of the grid, laid into pods as shares. Its data
parallel term counts the pods in use, which only bounds the data spread from above; who follows it
numbers the ranks of each pod in a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pulp

from trimtab.core.solve import Certificate, Limits, solve_milp
from trimtab.placement.grid import Candidate, Demand
from trimtab.placement.packing import gpu_packing, laid


@dataclass(frozen=True, slots=True)
class ArnoldAnswer:
    """What the programme says.

    Attributes:
        pods: in use.
        row_spread: most pods of a row, ``T``.
        certificate: of the weighted sum of both.
    """

    pods: int
    row_spread: int
    certificate: Certificate


def arnold_programme(demand: Demand, alpha: float) -> pulp.LpProblem:
    """Equations 4 to 10; ``alpha`` weighs the data parallel term."""
    rows, pods = range(demand.rows), range(len(demand.capacities))
    problem = pulp.LpProblem("arnold", pulp.LpMinimize)
    used = [pulp.LpVariable(f"y_{j}", cat=pulp.LpBinary) for j in pods]
    touches = [[pulp.LpVariable(f"s_{i}_{j}", cat=pulp.LpBinary) for j in pods] for i in rows]
    share = [[pulp.LpVariable(f"p_{i}_{j}", 0, 1) for j in pods] for i in rows]
    widest = pulp.LpVariable("T", 0)
    problem += alpha * pulp.lpSum(used) + (1 - alpha) * widest
    for i in rows:
        problem += pulp.lpSum(touches[i]) <= widest, f"spread_of_row_{i}"
        problem += pulp.lpSum(share[i]) == 1, f"row_{i}_placed"
        for j in pods:
            problem += share[i][j] <= touches[i][j], f"row_{i}_touches_{j}"
    for j in pods:
        room = demand.capacities[j] / demand.columns
        held = pulp.lpSum(share[i][j] for i in rows)
        problem += held <= room * used[j], f"capacity_of_{j}"
    return problem


def solve_arnold(demand: Demand, alpha: float, limits: Limits = Limits()) -> ArnoldAnswer:
    """Solves the programme as published.

    Raises:
        Infeasible: the pods do not hold the job.
        TrimtabError: no answer was found in time.
    """
    solution = solve_milp(arnold_programme(demand, alpha), limits=limits)
    used = sum(solution.values[f"y_{j}"] for j in range(len(demand.capacities)))
    return ArnoldAnswer(int(used), round(solution.values["T"]), solution.certificate)


def arnold(demand: Demand, alpha: float) -> Candidate | None:
    """The programme's optimum without a solver; None where the pods do not hold the job.

    A row spread of 1 takes the pods with most whole rows, one of 2 the largest pods, filled row by
    row; a larger one cannot save pods. With pods smaller than a row, the spread is counted.
    """
    choices = [c for c in (_whole_rows(demand), _next_fit(demand)) if c is not None]

    def published(candidate: Candidate) -> float:
        pods = len(np.unique(candidate.grid))
        return round(alpha * pods + (1 - alpha) * candidate.spread.pipeline, 9)

    return min(choices, key=published, default=None)


def _whole_rows(demand: Demand) -> Candidate | None:
    rows = np.array(demand.capacities, dtype=np.int64) // demand.columns
    largest = np.argsort(-rows, kind="stable")
    pods = np.repeat(largest, rows[largest])[: demand.rows]
    if len(pods) < demand.rows:
        return None
    grid = np.repeat(pods[:, None], demand.columns, axis=1)
    return Candidate.built(demand, grid, "arnold, whole rows")


def _next_fit(demand: Demand) -> Candidate | None:
    taken = gpu_packing(demand)
    if taken is None:
        return None
    return Candidate.built(demand, laid(demand, taken, "pp"), "arnold, split rows")
