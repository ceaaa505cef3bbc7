"""Columns of at most two pods: how many there may be, whatever the rows touch.

Draw a line between two pods for each column that they share, and a loop for a column in one pod.
Pods that hang together by lines are one more than these at most, and hold all their columns: so
``v`` of them have nodes for ``v - 1`` columns at least, and for no more than their nodes add up to.
Which pods best hang together is then a question of packing bins, and a small integer programme.
"""

from __future__ import annotations

from trimtab.placement.grid import Demand
from trimtab.placement.programme import Programme


def may_pair(demand: Demand, *, nodes: int) -> bool:
    """Whether each column may have at most two pods.

    Args:
        demand: the job's grid and the pods' free nodes.
        nodes: of the search tree at most.

    Returns:
        False where it is proven that there are no such columns.
    """
    programme = Programme()
    rows, pods = demand.rows, range(len(demand.capacities))
    room = sorted(demand.capacities, reverse=True)
    # A group is named for its first pod, so that no two groups can be interchanged.
    member = {
        (pod, first): programme.variable(upper=1, whole=True)
        for first in pods
        for pod in pods[first:]
    }
    held = [programme.variable(whole=True) for _ in pods]
    for pod in pods:
        programme.constrain([(member[pod, first], 1) for first in pods[: pod + 1]], low=1, high=1)
    for first in pods:
        own = [(member[pod, first], room[pod]) for pod in pods[first:]]
        programme.constrain([*own, (held[first], -rows)], low=0)
        short = [(member[pod, first], rows - room[pod]) for pod in pods[first:]]
        programme.constrain([*short, (member[first, first], -rows)], high=0)
        for pod in pods[first + 1 :]:
            programme.constrain([(member[pod, first], 1), (member[first, first], -1)], high=0)
    programme.constrain([(columns, 1) for columns in held], low=demand.columns)
    return programme.solve(nodes=nodes).feasible
