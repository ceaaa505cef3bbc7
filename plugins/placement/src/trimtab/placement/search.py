"""All that is known of a demand: the placements no other beats, and what none can beat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trimtab.placement.certificate import (
    Frontier,
    coarse_frontier,
    frontier,
    least_data,
    linear_least,
)
from trimtab.placement.config import Effort
from trimtab.placement.exchange import exchanged
from trimtab.placement.grid import Candidate, Demand, Spread, pareto
from trimtab.placement.leftovers import may_touch
from trimtab.placement.lone_columns import lone_columns
from trimtab.placement.neighbours import beside_their_like
from trimtab.placement.packing import packings
from trimtab.placement.paired_columns import may_pair
from trimtab.placement.priced_columns import priced_columns
from trimtab.placement.prices import NEAR, market
from trimtab.placement.row_choices import Pods
from trimtab.placement.row_paths import even_cuts, row_paths, useful_ranges
from trimtab.placement.strips import promising_covers, strip_covers

_SAME = 1e-9
_NODES = 300
"""Of each search tree; a count and not a time, so that every machine finds the same."""

_MANY_NODES = 1000
"""Of the search trees that decide what is left possible where nothing else has."""

_MOST_SHAPES = 400
"""Ways to cut a row up to which the tighter bound is asked for."""

_ROUNDS = 100
_FEW_ROUNDS = (40, 80)
"""Of pricing, to prove that there is no placement, and in each attempt to find one."""

_MOST_PRICED = 6000
"""Rows times capacities up to which columns are priced."""

_EXCHANGES = 5000
"""Programmes that are solved for each width of blocks, to exchange the pods of columns."""

_MOST_TURNED = 32
"""Rows up to which the pods of rows are exchanged too."""

_MOST_LONE = 600
"""Columns times pods up to which columns are placed one by one where rows forbid nothing."""

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

    def proves(self, alphas: Sequence[float]) -> bool:
        """Whether the best placement of each weight is proven optimal."""
        return all(self.gap(alpha) == 0 for alpha in alphas)


def quick_search(demand: Demand) -> Front | None:
    """The front of strips and packings with a quick bound; None where the pods do not hold it."""
    candidates = pareto([*strip_covers(demand), *packings(demand)])
    return Front(tuple(candidates), frontier(demand)) if candidates else None


def search(demand: Demand, alphas: Sequence[float], effort: Effort = "full") -> Front | None:
    """The front of a demand, refined until the best of each weight is proven or nothing helps.

    Args:
        demand: the job's grid and the pods' free nodes.
        alphas: the weights that matter.
        effort: ``quick`` refines nothing.

    Returns:
        None where the pods do not hold the job. Which pod is named before which does not matter.
    """
    room = np.array(demand.capacities)
    order = np.argsort(-room, kind="stable")
    ordered = replace(demand, capacities=tuple(room[order].tolist()))
    front = _search(ordered, alphas, effort)
    if front is None:
        return None
    named = (
        replace(found, grid=order[beside_their_like(found.grid)]) for found in front.candidates
    )
    return Front(tuple(named), front.bound)


def _search(demand: Demand, alphas: Sequence[float], effort: Effort) -> Front | None:
    front = _first_front(demand, alphas)
    if front is None or effort == "quick" or front.proves(alphas):
        return front
    return _refined(demand, front, alphas)


def _refined(demand: Demand, front: Front, alphas: Sequence[float]) -> Front:
    priced: set[Spread] = set()
    tried: set[Spread] = set()
    counted: set[int] = set()
    reached_for: set[Spread] = set()
    done: set[Spread] = set()
    for alpha in alphas:
        while spread := next(_open(demand, front, alpha, done), None):
            if spread not in priced:
                priced.add(spread)
                front = _paired(demand, front, spread) or _priced(demand, front, spread, _NODES)
            elif spread not in tried:
                tried.add(spread)
                front = _widened(demand, front, spread)
            elif spread.pipeline not in counted:
                counted.add(spread.pipeline)
                front = _tightened(demand, front, spread.pipeline)
            elif spread not in reached_for:
                # What takes longest is left for what nothing else decides.
                reached_for.add(spread)
                front = _exchanged(demand, front, spread)
            else:
                done.add(spread)
                front = _priced(demand, front, spread, _MANY_NODES)
    return front


def _first_front(demand: Demand, alphas: Sequence[float]) -> Front | None:
    """The strips that look best, and all that people use where those are not proven optimal."""
    bound = coarse_frontier(demand)
    promising = pareto(promising_covers(demand))
    if promising:
        front = _counted(demand, Front(tuple(promising), bound), alphas)
        if front.proves(alphas):
            return front
        bound = front.bound
    candidates = pareto([*strip_covers(demand), *packings(demand)])
    return _counted(demand, Front(tuple(candidates), bound), alphas) if candidates else None


def _counted(demand: Demand, front: Front, alphas: Sequence[float]) -> Front:
    """With the linear bound of each pipeline spread that might beat the best placement."""
    known = {1}
    for alpha in alphas:
        while spread := next(
            (s for s in _open(demand, front, alpha) if s.pipeline not in known), None
        ):
            known.add(spread.pipeline)
            least = linear_least(demand, spread.pipeline)
            front = Front(front.candidates, front.bound.raised(spread.pipeline, least))
    return front


def _open(
    demand: Demand, front: Front, alpha: float, done: Collection[Spread] = ()
) -> Iterator[Spread]:
    """Spreads that would beat the best placement and that nothing forbids, the best first.

    Of those with one pipeline spread that weigh the same the widest goes first, as the easiest.
    """
    best = front.best(alpha).spread.weighted(alpha)
    most = min(demand.rows, len(demand.capacities))
    better = [
        Spread(corner.pipeline, data)
        for corner in front.bound.corners
        for data in range(corner.data, most + 1)
    ]
    better = [s for s in better if s.weighted(alpha) < best - _SAME and s not in done]
    yield from sorted(better, key=lambda s: (round(s.weighted(alpha), 9), s.pipeline, -s.data))


def _tightened(demand: Demand, front: Front, pipeline: int) -> Front:
    return Front(
        front.candidates,
        front.bound.raised(
            pipeline, least_data(demand, pipeline, nodes=_NODES, shapes=_MOST_SHAPES)
        ),
    )


def _paired(demand: Demand, front: Front, spread: Spread) -> Front | None:
    """The bound where a spread asks for columns of two pods and there are none such; else None."""
    if spread.data != 2 or not _is_small(demand) or may_pair(demand, nodes=_NODES):
        return None
    bound = front.bound
    return Front(front.candidates, bound.raised(len(bound.least_data), spread.data + 1))


def _priced(demand: Demand, front: Front, spread: Spread, nodes: int) -> Front:
    """The bound with what prices say of a spread, of columns and of rows."""
    bound = front.bound
    pipeline = _least_pipeline(demand, spread, nodes)
    if pipeline > spread.pipeline:
        bound = bound.raised(min(pipeline - 1, len(bound.least_data)), spread.data + 1)
    data = _least_pipeline(demand.transposed, spread.swapped, nodes)
    return Front(front.candidates, bound.raised(spread.pipeline, data))


def _least_pipeline(demand: Demand, spread: Spread, nodes: int) -> int:
    """What prices say of the pipeline spread, given the data spread; 1 where they are not asked."""
    if demand.rows * len(demand.classes) > _MOST_PRICED:
        return 1
    decided = demand.rows * spread.pipeline
    offers = market(demand, spread.data, rounds=_ROUNDS, decided=decided)
    # What is bounded is a number of rows, hence whole.
    touched = math.ceil(offers.rows_touched)
    near = NEAR * decided <= touched <= decided
    if near and not may_touch(demand, spread.data, decided, offers, nodes=nodes):
        touched = decided + 1
    return math.ceil(touched / demand.rows)


def _widened(demand: Demand, front: Front, spread: Spread) -> Front:
    """The front with a placement of a spread, or with the proof that there is none."""
    found = None
    if spread.pipeline == len(front.bound.least_data) and _is_small(demand):
        lone = lone_columns(demand, spread.data, nodes=10 * _NODES)
        if not lone.possible:
            raised = front.bound.raised(spread.pipeline, spread.data + 1)
            return Front(front.candidates, raised)
        found = lone.found
    found = found or _find(demand, spread)
    if found is None:
        return front
    return Front(tuple(pareto([*front.candidates, found])), front.bound)


def _exchanged(demand: Demand, front: Front, spread: Spread) -> Front:
    """The front with a placement of a spread, reached from those that are wider in one way."""
    turned = [candidate.transposed for candidate in reversed(front.candidates)]
    found = _reached(demand, front.candidates, spread)
    if found is None and demand.rows <= _MOST_TURNED:
        over = _reached(demand.transposed, turned, spread.swapped)
        found = None if over is None else over.transposed
    return front if found is None else Front(tuple(pareto([*front.candidates, found])), front.bound)


def _reached(demand: Demand, candidates: Sequence[Candidate], spread: Spread) -> Candidate | None:
    """A placement of a spread by exchanging the pods of columns."""
    for columns in _starts(candidates, spread):
        found = exchanged(demand, spread, columns, programmes=_EXCHANGES, nodes=_NODES)
        if found is not None:
            return found
    return None


def _starts(candidates: Sequence[Candidate], spread: Spread) -> Iterator[list[Pods]]:
    """The pods of columns in the next placements of as many pods in a column, and in a row."""
    flat = [c for c in candidates if c.spread.data <= spread.data]
    if flat:
        yield [frozenset(column) for column in flat[0].grid.T.tolist()]
    steep = [c for c in candidates if c.spread.pipeline <= spread.pipeline]
    if steep:
        counts = [Counter(column) for column in steep[-1].grid.T.tolist()]
        yield [frozenset(pod for pod, _ in own.most_common(spread.data)) for own in counts]


def _is_small(demand: Demand) -> bool:
    return demand.columns * len(demand.capacities) <= _MOST_LONE


def _find(demand: Demand, spread: Spread) -> Candidate | None:
    """A placement of at most the given spreads: priced columns or row paths, of either kind."""
    if spread.data == 2:
        found = _price(demand, spread)
        if found is None and spread.pipeline == 2:
            found = _turned(_price, demand, spread)
        return found or _turned(_walk, demand, spread)
    if spread.pipeline == 2:
        found = _turned(_price, demand, spread)
        if found is not None:
            return found
    for parts in (_COARSE, demand.columns):
        found = _walk(demand, spread, parts)
        if found is not None:
            return found
        if demand.columns <= parts:
            break
    found = _turned(_walk, demand, spread) or _ragged(demand, spread)
    if found is None and spread.data == 3:
        found = _price(demand, spread)
    if found is None and spread.pipeline == 3:
        found = _turned(_price, demand, spread)
    return found


def _turned(
    find: Callable[[Demand, Spread], Candidate | None], demand: Demand, spread: Spread
) -> Candidate | None:
    """What is found with rows and columns swapped."""
    found = find(demand.transposed, spread.swapped)
    return None if found is None else found.transposed


def _price(demand: Demand, spread: Spread) -> Candidate | None:
    if demand.rows * len(demand.classes) > _MOST_PRICED:
        return None
    nodes = _NODES if spread.data == 2 else _NODES // 6
    for rounds in _FEW_ROUNDS:
        offers = market(demand, spread.data, rounds=rounds)
        found = priced_columns(demand, offers, spread.pipeline, nodes=nodes)
        if found is not None:
            return found
    return None


def _walk(demand: Demand, spread: Spread, parts: int | None = None) -> Candidate | None:
    """Row paths with at most so many cuts, and with fewer where the programme would be large."""
    kinds = len(demand.classes)
    parts = min(parts or demand.columns, demand.columns)
    if spread.pipeline > 1:  # then there are at least as many ranges as parts
        parts = min(parts, _MOST_RANGES // kinds)
    while kinds * len(useful_ranges(parts, spread.pipeline)) > _MOST_RANGES:
        parts -= 1
    cuts = even_cuts(demand.columns, parts)
    if parts <= 1:
        return None
    return row_paths(demand, spread, cuts=cuts, nodes=_NODES)


def _ragged(demand: Demand, spread: Spread) -> Candidate | None:
    ranges = len(useful_ranges(demand.columns, spread.pipeline))
    if len(demand.classes) * ranges > _MOST_RAGGED:
        return None
    cuts = even_cuts(demand.columns, demand.columns)
    return row_paths(demand, spread, cuts=cuts, nodes=_NODES, ragged=True)
