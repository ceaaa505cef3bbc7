"""What no placement can beat: a bound from counting, whatever the placement looks like.

A pod whose cells lie in ``a`` rows and ``b`` columns holds at most ``min(capacity, a b)`` of them.
If every row touches at most ``R`` pods and every column at most ``C``, the pods' ``a`` sum to at
most ``R`` times the rows and their ``b`` to at most ``C`` times the columns. Moreover each row is
cut into at most ``R`` parts whose widths sum to the columns, and a part of width ``w`` needs a pod
that touches ``w`` columns. The fewest columns to touch for given ``R`` are a linear programme; with
the cuts of rows, and in whole numbers, they are a small integer one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from trimtab.placement.grid import Demand, Spread
from trimtab.placement.programme import Programme

_SLACK = 1e-6
"""Solvers' rounding; a bound is lowered by it before it is rounded up."""

_MOST_WIDTHS = 5_000
"""Pairs of columns touched and used in a row, up to which the tighter bound is tried."""


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
        return min(spread.weighted(alpha) for spread in self.corners)

    @property
    def corners(self) -> list[Spread]:
        """The least data spread of each pipeline spread."""
        return [
            Spread(index + 1, data)
            for index, data in enumerate(self.least_data)
            if data is not None
        ]

    def raised(self, pipeline: int, data: int | None) -> Frontier:
        """The frontier with more known of one pipeline spread, and so of the lesser ones too."""
        floor = math.inf if data is None else data
        known = [math.inf if least is None else least for least in self.least_data]
        lifted = [
            max(least, floor) if index < pipeline else least for index, least in enumerate(known)
        ]
        return Frontier(tuple(None if math.isinf(least) else int(least) for least in lifted))


def coarse_frontier(demand: Demand) -> Frontier:
    """What whole rows and whole columns say; no programme is solved."""
    most, whole = _most_pipeline(demand), fewest_pods(demand.transposed)
    alone = most + 1 if whole is None else whole
    later = (1 if pipeline >= alone else 2 for pipeline in range(2, most + 1))
    return Frontier((fewest_pods(demand), *later))


def frontier(demand: Demand) -> Frontier:
    """The bound by linear programmes, for every pipeline spread that can occur."""
    found = coarse_frontier(demand)
    for pipeline in range(2, _most_pipeline(demand) + 1):
        found = found.raised(pipeline, linear_least(demand, pipeline))
    return found


def _most_pipeline(demand: Demand) -> int:
    return min(demand.columns, sum(1 for capacity in demand.capacities if capacity))


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


def least_data(demand: Demand, pipeline: int, *, nodes: int, shapes: int) -> int | None:
    """The tighter bound on the data spread for a pipeline spread; None where none has it.

    Args:
        demand: the job's grid and the pods' free nodes.
        pipeline: the pipeline spread.
        nodes: of the search tree at most.
        shapes: ways to cut a row at most; where there are more, nothing is said.
    """
    widths = sum(_number_of_widths(demand, capacity) for capacity, _ in demand.classes)
    if widths > _MOST_WIDTHS:
        return 1
    cuts = list(islice(_shapes(demand.columns, pipeline), shapes + 1))
    if len(cuts) > shapes:
        return 1
    answer = _shaped_programme(demand, cuts).solve(nodes=nodes)
    if not answer.feasible:
        return None
    return max(1, math.ceil(answer.bound / demand.columns - _SLACK))


def _number_of_widths(demand: Demand, capacity: int) -> int:
    """How many pairs of columns touched and columns used in a row a pod can have."""
    most = min(demand.columns, capacity)
    return most * (most + 1) // 2


def linear_least(demand: Demand, pipeline: int) -> int | None:
    """The bound on the data spread for a pipeline spread; None where none has it."""
    answer = _programme(demand, pipeline).solve()
    if not answer.feasible:
        return None
    return max(1, math.ceil(answer.bound / demand.columns - _SLACK))


def _programme(demand: Demand, pipeline: int) -> Programme:
    """For each capacity and number of columns: how many pods, their rows together, their cells."""
    programme = Programme()
    rows: list[tuple[int, float]] = []
    cells: list[tuple[int, float]] = []
    for capacity, number in demand.classes:
        same: list[tuple[int, float]] = []
        for columns in range(1, min(demand.columns, capacity) + 1):
            pods = programme.variable(columns, upper=number)
            touched, held = programme.variable(), programme.variable()
            programme.constrain([(held, 1), (touched, -columns)], high=0)
            programme.constrain([(held, 1), (pods, -capacity)], high=0)
            programme.constrain([(touched, 1), (pods, -demand.rows)], high=0)
            same.append((pods, 1))
            rows.append((touched, 1))
            cells.append((held, 1))
        programme.constrain(same, high=number)
    programme.constrain(rows, high=demand.rows * pipeline)
    programme.constrain(cells, low=demand.cells)
    return programme


def _shapes(columns: int, parts: int, widest: int | None = None) -> Iterator[tuple[int, ...]]:
    """The ways to cut a row into at most so many parts, whatever their order."""
    if columns == 0:
        yield ()
    elif parts:
        for width in range(min(columns, widest or columns), 0, -1):
            for rest in _shapes(columns - width, parts - 1, width):
                yield (width, *rest)


def _shaped_programme(demand: Demand, shapes: list[tuple[int, ...]]) -> Programme:
    """As above, with the rows of a pod told apart by the width they have in it."""
    programme = Programme()
    parts: dict[int, list[tuple[int, float]]] = {w: [] for w in range(1, demand.columns + 1)}
    for capacity, number in demand.classes:
        same: list[tuple[int, float]] = []
        for columns in range(1, min(demand.columns, capacity) + 1):
            pods = programme.variable(columns, upper=number, whole=True)
            by_width = [(programme.variable(whole=True), w) for w in range(1, columns + 1)]
            programme.constrain([*by_width, (pods, -capacity)], high=0)
            programme.constrain([*((v, 1) for v, _ in by_width), (pods, -demand.rows)], high=0)
            same.append((pods, 1))
            for variable, width in by_width:
                parts[width].append((variable, 1))
        programme.constrain(same, high=number)
    rows = [(programme.variable(whole=True), shape) for shape in shapes]
    programme.constrain([(variable, 1) for variable, _ in rows], low=demand.rows, high=demand.rows)
    for width, terms in parts.items():
        used = [(v, -float(shape.count(width))) for v, shape in rows if width in shape]
        programme.constrain([*terms, *used], low=0, high=0)
    return programme
