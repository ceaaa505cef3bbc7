"""All that is known of a demand: the placements no other beats, and what none can beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trimtab.placement.certificate import Frontier, frontier, least_data
from trimtab.placement.grid import Candidate, Demand, Spread, pareto
from trimtab.placement.packing import packings
from trimtab.placement.row_paths import even_cuts, row_paths, useful_ranges
from trimtab.placement.strips import strip_covers

_SAME = 1e-9
_NODES = 300
"""Of each search tree; a count and not a time, so that every machine finds the same."""

_MOST_SHAPES = 400
_FEW_SHAPES = 30
"""Ways to cut a line of the grid up to which the tighter bound is asked for; fewer for columns,
whose programmes are large and seldom decide."""

_COARSE = 8
"""Ranges of columns that are tried first where there are more columns."""

_MOST_RANGES = 1800
_MOST_RAGGED = 300
"""Capacities times ranges of columns that a programme may have; fewer with ragged ranges."""


@dataclass(frozen=True, slots=True)
class Front:
    """Placements by their trade-off of pipeline and data spread, and the bound on all others.

    Attributes:
        candidates: by pipeline spread; none beats another in both.
        bound: what no placement goes below.
    """

    candidates: tuple[Candidate, ...]
    bound: Frontier

    def best(self, alpha: float) -> Candidate:
        """The placement with the least weighted spread; of equals, the least sum of spreads."""
        return min(
            self.candidates,
            key=lambda c: (
                round(c.spread.weighted(alpha), 9),
                c.spread.pipeline + c.spread.data,
                c.spread.pipeline,
            ),
        )

    def gap(self, alpha: float) -> float:
        """How far the best placement lies above the bound; 0 where it is proven optimal."""
        gap = self.best(alpha).spread.weighted(alpha) - self.bound.least(alpha)
        return gap if gap > _SAME else 0.0


def quick_search(demand: Demand) -> Front | None:
    """The front of strips and packings with a quick bound; None where the pods do not hold it."""
    candidates = pareto([*strip_covers(demand), *packings(demand)])
    return Front(tuple(candidates), frontier(demand)) if candidates else None


def search(demand: Demand, alphas: Sequence[float]) -> Front | None:
    """The front of a demand, refined until the best of each weight is proven or nothing helps.

    Args:
        demand: the job's grid and the pods' free nodes.
        alphas: the weights that matter.

    Returns:
        None where the pods do not hold the job.
    """
    front = quick_search(demand)
    if front is None:
        return None
    known: set[tuple[str, int]] = set()
    tried: set[Spread] = set()
    for alpha in alphas:
        while spread := next(_open(front, alpha, tried), None):
            if ("rows", spread.pipeline) not in known:
                known.add(("rows", spread.pipeline))
                front = _tightened(demand, front, spread.pipeline)
            elif ("columns", spread.data) not in known:
                known.add(("columns", spread.data))
                front = _tightened_across(demand, front, spread.data)
            else:
                tried.add(spread)
                front = _widened(demand, front, spread)
    return front


def _open(front: Front, alpha: float, tried: set[Spread]) -> Iterator[Spread]:
    """Spreads that would beat the best placement and that nothing forbids, the best first."""
    best = front.best(alpha).spread.weighted(alpha)
    better = [
        Spread(corner.pipeline, data)
        for corner in front.bound.corners
        for data in range(corner.data, front.candidates[0].spread.data + 1)
    ]
    better = [s for s in better if s.weighted(alpha) < best - _SAME and s not in tried]
    yield from sorted(better, key=lambda s: (round(s.weighted(alpha), 9), s.pipeline))


def _tightened(demand: Demand, front: Front, pipeline: int) -> Front:
    return Front(
        front.candidates,
        front.bound.raised(
            pipeline, least_data(demand, pipeline, nodes=_NODES, shapes=_MOST_SHAPES)
        ),
    )


def _tightened_across(demand: Demand, front: Front, data: int) -> Front:
    """The same bound on the transposed grid: the least pipeline spread for a data spread."""
    pipeline = least_data(demand.transposed, data, nodes=_NODES, shapes=_FEW_SHAPES)
    most = len(front.bound.least_data) if pipeline is None else pipeline - 1
    return Front(front.candidates, front.bound.raised(most, data + 1))


def _widened(demand: Demand, front: Front, spread: Spread) -> Front:
    found = _find(demand, spread)
    if found is None:
        return front
    return Front(tuple(pareto([*front.candidates, found])), front.bound)


def _find(demand: Demand, spread: Spread) -> Candidate | None:
    """A placement of at most the given spreads, by row paths of either orientation."""
    for parts in (_COARSE, demand.columns):
        found = _walk(demand, spread, parts)
        if found is not None:
            return found
        if demand.columns <= parts:
            break
    turned = _walk(demand.transposed, spread.swapped, demand.rows)
    if turned is not None:
        return turned.transposed
    ranges = len(useful_ranges(demand.columns, spread.pipeline))
    if len(demand.classes) * ranges > _MOST_RAGGED:
        return None
    return _walk(demand, spread, demand.columns, ragged=True)


def _walk(demand: Demand, spread: Spread, parts: int, *, ragged: bool = False) -> Candidate | None:
    """Row paths with at most so many cuts, and with fewer where the programme would be large."""
    kinds = len(demand.classes)
    parts = min(parts, demand.columns)
    while kinds * len(useful_ranges(parts, spread.pipeline)) > _MOST_RANGES:
        parts -= 1
    cuts = even_cuts(demand.columns, parts)
    if parts <= 1:
        return None
    return row_paths(demand, spread, cuts=cuts, nodes=_NODES, ragged=ragged)
