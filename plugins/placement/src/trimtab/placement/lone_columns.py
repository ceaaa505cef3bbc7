"""Columns that need not share pods: pipelines may touch a pod for each stage.

Where a row may touch as many pods as there are columns, rows forbid nothing. A column then only
needs few pods that hold it beside what other columns take of them. Whether there are such is an
integer programme, and an exact one: where it has no solution, no placement has these spreads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trimtab.placement.grid import Candidate, Demand
from trimtab.placement.programme import Programme


@dataclass(frozen=True, slots=True)
class LoneColumns:
    """What is known of columns of few pods.

    Attributes:
        found: a placement, if one was found.
        possible: False where it is proven that there is none.
    """

    found: Candidate | None
    possible: bool


def lone_columns(demand: Demand, most: int, *, nodes: int) -> LoneColumns:
    """Looks for columns of at most ``most`` pods each, whatever the rows touch.

    Args:
        demand: the job's grid and the pods' free nodes.
        most: pods of a column.
        nodes: of the search tree at most.
    """
    programme, columns = Programme(), range(demand.columns)
    pods = [pod for pod, capacity in enumerate(demand.capacities) if capacity]
    cells: dict[tuple[int, int], int] = {}
    used: dict[tuple[int, int], int] = {}
    for column in columns:
        for pod in pods:
            room = min(demand.capacities[pod], demand.rows)
            cells[column, pod] = programme.variable(upper=room)
            used[column, pod] = programme.variable(upper=1, whole=True)
            own = [(cells[column, pod], 1.0), (used[column, pod], -float(room))]
            programme.constrain(own, high=0)
        held = [(cells[column, pod], 1) for pod in pods]
        programme.constrain(held, low=demand.rows, high=demand.rows)
        programme.constrain([(used[column, pod], 1) for pod in pods], high=most)
    for pod in pods:
        given = [(cells[column, pod], 1) for column in columns]
        programme.constrain(given, high=demand.capacities[pod])
    answer = programme.solve(nodes=nodes)
    if answer.values is None:
        return LoneColumns(None, answer.feasible)
    settled = np.full(len(answer.values), np.nan)
    for variable in used.values():
        settled[variable] = round(answer.values[variable])
    for variable in cells.values():
        programme.whole[variable] = True
    whole = programme.solve(nodes=nodes, fixed=settled).values
    if whole is None:
        return LoneColumns(None, possible=True)
    grid = np.stack(
        [np.repeat(pods, [round(whole[cells[column, pod]]) for pod in pods]) for column in columns],
        axis=1,
    )
    return LoneColumns(Candidate.built(demand, grid, "lone columns"), possible=True)
