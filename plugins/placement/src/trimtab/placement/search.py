"""All that is known of a demand: the placements no other beats, and what none can beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trimtab.placement.certificate import Frontier, frontier, least_data
from trimtab.placement.grid import Candidate, Demand, Spread, pareto
from trimtab.placement.packing import packings
from trimtab.placement.row_paths import even_cuts, row_paths
from trimtab.placement.strips import strip_covers

_SAME = 1e-9
_NODES = 40
"""Of each search tree; a count and not a time, so that every machine finds the same."""

_COARSE = 8
"""Ranges of columns that are tried first where there are more columns."""

_FINEST = 16
_MOST_RANGES = 2500
"""Capacities times ranges of columns that a programme may have."""


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
    tightened: set[int] = set()
    tried: set[Spread] = set()
    for alpha in alphas:
        while spread := next(_open(front, alpha, tried), None):
            if spread.pipeline not in tightened:
                tightened.add(spread.pipeline)
                front = _tightened(demand, front, spread.pipeline)
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
        front.bound.raised(pipeline, least_data(demand, pipeline, nodes=_NODES)),
    )


def _widened(demand: Demand, front: Front, spread: Spread) -> Front:
    found = _find(demand, spread)
    if found is None:
        return front
    return Front(tuple(pareto([*front.candidates, found])), front.bound)


def _find(demand: Demand, spread: Spread) -> Candidate | None:
    """A placement of at most the given spreads, by row paths of either orientation."""
    for parts in dict.fromkeys((_COARSE, _FINEST)):
        found = _walk(demand, spread, parts)
        if found is not None:
            return found
        if demand.columns <= parts:
            break
    if spread.data > 3:
        return None
    turned = _walk(demand.transposed, spread.swapped, 32 if spread.data == 2 else 12)
    return None if turned is None else turned.transposed


def _walk(demand: Demand, spread: Spread, parts: int) -> Candidate | None:
    cuts = even_cuts(demand.columns, parts)
    ranges = len(cuts) * (len(cuts) - 1) // 2
    if len(demand.classes) * ranges > _MOST_RANGES:
        return None
    return row_paths(demand, spread, cuts=cuts, nodes=_NODES)
