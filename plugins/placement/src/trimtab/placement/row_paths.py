"""Row paths: each pod gets a range of columns, each row walks over pods from the first column on.

This is the widest family here. Strip covers are the special case in which all rows change pods at
the same columns. Which ranges the pods get, so that no row meets more than ``R`` pods and no
column more than ``C``, is a mixed-integer programme: the rows are a flow through the columns, and
a pod whose range is ``w`` wide carries ``capacity // w`` rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.placement.grid import Candidate, Demand, Spread
from trimtab.placement.programme import Programme

Range = tuple[int, int]
"""The first cut and the last one of a range of columns."""


@dataclass(frozen=True, slots=True)
class _Model:
    """The programme and what its variables mean.

    Attributes:
        taken: how many pods of a capacity take a range.
        used: how many rows these pods have in a range within their own.
        flow: how many rows walk a range as their step of a number.
    """

    programme: Programme
    taken: dict[tuple[int, Range], int]
    used: dict[tuple[int, Range, Range], int]
    flow: dict[tuple[Range, int], int]


def even_cuts(columns: int, most: int) -> list[int]:
    """Column numbers at which ranges may begin and end; all of them, or ``most`` + 1 spread out."""
    parts = min(columns, most)
    return [round(part * columns / parts) for part in range(parts + 1)]


def useful_ranges(end: int, steps: int) -> list[Range]:
    """The ranges that a walk of at most so many steps can use."""
    return [
        (start, stop)
        for start in range(end)
        for stop in range(start + 1, end + 1)
        if (start > 0) + (stop < end) < steps
    ]


def row_paths(
    demand: Demand, spread: Spread, *, cuts: Sequence[int], nodes: int, ragged: bool = False
) -> Candidate | None:
    """A placement of at most the given spreads.

    Args:
        demand: the job's grid and the pods' free nodes.
        spread: what is asked for.
        cuts: where ranges of columns may begin and end; from 0 to the number of columns.
        nodes: of the search tree at most.
        ragged: whether pods may have only a part of their range in some rows, which uses up what
            whole widths leave over; a larger programme.

    Returns:
        None where there is none of this kind, or none was found.
    """
    model = _model(demand, spread, cuts, ragged)
    found = model.programme.solve(nodes=nodes)
    if found.values is None:
        return None
    # The flow was left continuous; with the ranges fixed, whole rows are quickly found.
    for variable in (*model.flow.values(), *model.used.values()):
        model.programme.whole[variable] = True
    ranges = np.full(len(found.values), np.nan)
    for variable in model.taken.values():
        ranges[variable] = round(found.values[variable])
    whole = model.programme.solve(nodes=nodes, fixed=ranges)
    if whole.values is None:
        return None
    values = [round(value) for value in whole.values]
    paths = _paths({key: values[v] for key, v in model.flow.items()}, demand.rows, len(cuts) - 1)
    taken = {key: values[v] for key, v in model.taken.items() if values[v]}
    used = {key: values[v] for key, v in model.used.items() if values[v]}
    return _build(demand, cuts, paths, taken, used)


def _model(demand: Demand, spread: Spread, cuts: Sequence[int], ragged: bool) -> _Model:
    programme, end = Programme(), len(cuts) - 1
    ranges = useful_ranges(end, spread.pipeline)
    carried: dict[Range, list[tuple[int, float]]] = {each: [] for each in ranges}
    crossed: list[list[tuple[int, float]]] = [[] for _ in range(end)]
    taken: dict[tuple[int, Range], int] = {}
    used: dict[tuple[int, Range, Range], int] = {}
    for capacity, number in demand.classes:
        own: list[tuple[int, float]] = []
        for each in ranges:
            rows = min(capacity // (cuts[each[1]] - cuts[each[0]]), demand.rows)
            if rows:
                variable = programme.variable(upper=number, whole=True)
                taken[capacity, each] = variable
                own.append((variable, 1))
                for column in range(*each):
                    crossed[column].append((variable, 1))
                within = _within(each, ranges) if ragged else [each]
                parts = {part: programme.variable() for part in within}
                used |= {(capacity, each, part): held for part, held in parts.items()}
                _hold(programme, cuts, parts, variable, (rows, capacity, demand.rows))
                for part, held in parts.items():
                    carried[part].append((held, -1))
        programme.constrain(own, high=number)
    for pods in crossed:
        programme.constrain(pods, high=spread.data)
    flow = _flow(programme, demand.rows, spread.pipeline, end, carried)
    return _Model(programme, taken, used, flow)


def _within(each: Range, ranges: Sequence[Range]) -> list[Range]:
    return [part for part in ranges if each[0] <= part[0] and part[1] <= each[1]]


def _hold(
    programme: Programme,
    cuts: Sequence[int],
    parts: dict[Range, int],
    pods: int,
    room: tuple[int, int, int],
) -> None:
    """Keeps what pods hold of a range and its parts within their rows and cells.

    Args:
        programme: where the constraints go.
        cuts: where ranges may begin and end.
        parts: the variables of the rows in each part.
        pods: the variable of the number of pods.
        room: rows of the whole width that a pod holds, its cells, and the rows of the grid.
    """
    rows, cells, most = room
    if len(parts) == 1:
        programme.constrain([*((held, 1) for held in parts.values()), (pods, -rows)], high=0)
        return
    widths = [(held, cuts[stop] - cuts[start]) for (start, stop), held in parts.items()]
    programme.constrain([*widths, (pods, -cells)], high=0)
    programme.constrain([*((held, 1) for held in parts.values()), (pods, -most)], high=0)


def _flow(
    programme: Programme,
    rows: int,
    steps: int,
    end: int,
    carried: dict[Range, list[tuple[int, float]]],
) -> dict[tuple[Range, int], int]:
    """Rows go from cut 0 to the last in at most ``steps`` steps."""
    flow: dict[tuple[Range, int], int] = {}
    into: dict[tuple[int, int], list[tuple[int, float]]] = defaultdict(list)
    for start, stop in carried:
        own: list[tuple[int, float]] = []
        for step in range(steps):
            reachable = step <= start and (step > 0 or start == 0)
            if reachable and (step < steps - 1 or stop == end):
                variable = programme.variable(upper=rows)
                flow[(start, stop), step] = variable
                own.append((variable, 1))
                into[stop, step + 1].append((variable, 1))
                into[start, step].append((variable, -1))
        programme.constrain([*own, *carried[start, stop]], high=0)
    programme.constrain(into.pop((0, 0)), low=-rows, high=-rows)
    for (cut, _), terms in into.items():
        if cut != end:
            programme.constrain(terms, low=0, high=0)
    return flow


def _paths(flow: dict[tuple[Range, int], int], rows: int, end: int) -> list[list[Range]]:
    """Takes the flow apart into the ranges of each row; neighbours are alike."""
    left = dict(sorted(flow.items()))
    paths: list[list[Range]] = []
    for _ in range(rows):
        path: list[Range] = []
        at = 0
        while at != end:
            key = next(k for k, n in left.items() if n and k[0][0] == at and k[1] == len(path))
            left[key] -= 1
            path.append(key[0])
            at = key[0][1]
        paths.append(path)
    return sorted(paths)


def _build(
    demand: Demand,
    cuts: Sequence[int],
    paths: Sequence[Sequence[Range]],
    taken: dict[tuple[int, Range], int],
    used: dict[tuple[int, Range, Range], int],
) -> Candidate | None:
    waiting: dict[int, list[int]] = defaultdict(list)
    for pod, capacity in enumerate(demand.capacities):
        waiting[min(capacity, demand.cells)].append(pod)
    users: dict[Range, list[int]] = defaultdict(list)
    for row, path in enumerate(paths):
        for part in path:
            users[part].append(row)
    grid = np.full((demand.rows, demand.columns), -1, dtype=np.int64)
    for (capacity, each), number in sorted(taken.items()):
        left = {part: n for (c, e, part), n in used.items() if (c, e) == (capacity, each)}
        for _ in range(number):
            pod, room = waiting[capacity].pop(0), capacity
            # The widest parts go first, so that narrow ones fill what they leave.
            for part in sorted(left, key=lambda p: (p[0] - p[1], p)):
                width = cuts[part[1]] - cuts[part[0]]
                rows = users[part][: min(left[part], room // width)]
                grid[rows, cuts[part[0]] : cuts[part[1]]] = pod
                del users[part][: len(rows)]
                left[part] -= len(rows)
                room -= len(rows) * width
    return Candidate.built(demand, grid, "row paths")
