"""Rows for columns whose pods are settled: an integer programme that leaves nothing else open.

Where it is known which pods each column may use, a row is a choice of few pods that meets every
column. How many rows make each choice, and how their cells are shared out where a choice has two
pods of one column, is a small programme: given whole choices, sharing out is a transport problem.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from trimtab.placement.grid import Candidate, Demand, PodGrid
from trimtab.placement.programme import Programme

Pods = frozenset[int]

_MOST_CHOICES = 800


def rows_for(
    demand: Demand, columns: Sequence[Pods], most: int, *, nodes: int, method: str
) -> Candidate | None:
    """The grid whose columns use these pods, and whose rows touch at most ``most``.

    Args:
        demand: the job's grid and the pods' free nodes.
        columns: the pods of each column.
        most: pods of a row.
        nodes: of the search tree at most.
        method: what the placement is called.
    """
    kinds = Counter(columns)
    choices = _choices(sorted(kinds, key=sorted), most)
    if not choices:
        return None
    programme = Programme()
    rows = [programme.variable(upper=demand.rows, whole=True) for _ in choices]
    programme.constrain([(variable, 1) for variable in rows], low=demand.rows, high=demand.rows)
    held: dict[int, list[tuple[int, float]]] = defaultdict(list)
    shared: dict[tuple[Pods, Pods], list[tuple[int, float]]] = defaultdict(list)
    for choice, variable in zip(choices, rows, strict=True):
        for kind, number in kinds.items():
            both = choice & kind
            if len(both) == 1:
                held[min(both)].append((variable, number))
            else:
                shared[both, kind].append((variable, -number))
    parts: dict[tuple[Pods, Pods, int], int] = {}
    for (both, kind), terms in shared.items():
        for pod in sorted(both):
            parts[both, kind, pod] = programme.variable(whole=True)
            held[pod].append((parts[both, kind, pod], 1))
            terms.append((parts[both, kind, pod], 1))
        programme.constrain(terms, low=0, high=0)
    for pod, terms in held.items():
        programme.constrain(terms, high=demand.capacities[pod])
    values = programme.solve(nodes=nodes).values
    if values is None:
        return None
    made = [
        choice
        for choice, variable in zip(choices, rows, strict=True)
        for _ in range(round(values[variable]))
    ]
    turns = {key: round(values[variable]) for key, variable in parts.items()}
    return Candidate.built(demand, _grid(demand, columns, made, turns), method)


def _choices(kinds: Sequence[Pods], most: int) -> list[Pods]:
    """Choices of at most so many pods that meet every kind of column: the least ones, and more."""
    found: dict[Pods, None] = {}
    seen: set[Pods] = set()

    def meet(chosen: Pods) -> None:
        if chosen in seen or len(found) == _MOST_CHOICES:
            return
        seen.add(chosen)
        missed = [kind for kind in kinds if not kind & chosen]
        if not missed:
            found[chosen] = None
        elif len(chosen) < most:
            fewest = min(missed, key=len)
            for pod in sorted(fewest):
                meet(chosen | {pod})

    meet(frozenset())
    pods = sorted(frozenset().union(*kinds))
    choices = list(found)
    for chosen in choices:  # which grows meanwhile
        if len(chosen) < most and len(choices) < _MOST_CHOICES:
            more = [wider for pod in pods if (wider := chosen | {pod}) not in found]
            found.update(dict.fromkeys(more))
            choices += more
    return choices[:_MOST_CHOICES]


def _grid(
    demand: Demand,
    columns: Sequence[Pods],
    rows: Sequence[Pods],
    turns: dict[tuple[Pods, Pods, int], int],
) -> PodGrid:
    grid = np.empty((demand.rows, demand.columns), dtype=np.int64)
    for row, column in np.ndindex(grid.shape):
        kind = columns[column]
        both = rows[row] & kind
        pod = min(both)
        if len(both) > 1:
            pod = next(pod for pod in sorted(both) if turns[both, kind, pod])
            turns[both, kind, pod] -= 1
        grid[row, column] = pod
    return grid
