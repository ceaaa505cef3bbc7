"""Staged exchange among ranks that stand in a grid: so many below each of so many switches.

A stage has groups of ``a`` ranks below each of ``b`` children of a switch. The basic plan types
know the stages that end below a switch before they begin above it; here each stage takes any part
of both, and two such plans may share the payload, so that links between switches work while those
of hosts do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
from numpy.typing import NDArray

from trimtab.core.collectives import UNIT, Layout, Step
from trimtab.core.collectives.combine import SHARES, beside, staged
from trimtab.core.cost import ExchangeCost, PlanEvaluator
from trimtab.core.cost.plan_cost import MOST_CHUNKS
from trimtab.gentree.schemes import Built

Floats = NDArray[np.float64]

Stage = tuple[int, int]
"""How many ranks below each child are in a group, and of how many children."""

MOST_STAGES = 3

FIRST = 6
"""The best grids, each of which is tried beside all others."""

MOST_PAIRS = 24
"""So many pairs are evaluated at most."""

NEAR = 1.005
"""Pairs whose estimate is so near to the best time so far may still be better with other shares."""

COARSE, FINE = np.arange(16, 32) / 32, np.arange(64, 128) / 128
"""Shares of the first of two grids that are estimated, and those that are evaluated."""


@dataclass(frozen=True)
class Grid:
    """Stages whose groups hold all ranks in the end.

    Attributes:
        stages: of direct exchange, the first one first.
    """

    stages: tuple[Stage, ...]

    @property
    def name(self) -> str:
        """For example ``4*2x2*4``: groups of 4 below each of 2 children, then of 2 below 4."""
        return "x".join(f"{a}*{b}" if b > 1 else str(a) for a, b in self.stages)

    def build(self, parties: Sequence[Layout], one_shots: int = 0) -> Built:
        """The steps among parties in depth-first order, and the layout behind them.

        Args:
            parties: their layouts.
            one_shots: so many of the last stages are one-shot.
        """
        factors = [a * b for a, b in self.stages]
        return staged([parties[place] for place in self.places.tolist()], factors, one_shots)

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """The parties in an order in which the groups of each stage lie together."""
        ranks, children = (prod(numbers) for numbers in zip(*self.stages, strict=True))
        inside, child = np.tile(np.arange(ranks), children), np.repeat(np.arange(children), ranks)
        digits = []
        for a, b in self.stages:
            digits += [inside % a, child % b]
            inside, child = inside // a, child // b
        found: NDArray[np.int64] = np.lexsort(digits)
        return found


def grids(ranks: int, children: int, most_stages: int = MOST_STAGES) -> Iterator[Grid]:
    """All grids of so many ranks below each of so many children."""
    for count in range(1, most_stages + 1):
        for inside in _products(ranks, count):
            for across in _products(children, count):
                stages = tuple(zip(inside, across, strict=True))
                if (1, 1) not in stages:
                    yield Grid(stages)


def _products(number: int, count: int) -> Iterator[tuple[int, ...]]:
    """Every way to write a number as a product of so many factors from 1."""
    if count == 1:
        yield (number,)
        return
    for factor in range(1, number + 1):
        if number % factor == 0:
            for rest in _products(number // factor, count - 1):
                yield (factor, *rest)


@dataclass(frozen=True)
class Pair:
    """Two grids side by side, the second one with the rest of the payload.

    Attributes:
        one, other: the grids; the other has no more stages.
        share: what the first one has of the payload, in whole parts of `SHARES`.
        late: whether the other ends with the last stage instead of beginning with the first.
    """

    one: Grid
    other: Grid
    share: int
    late: bool

    @property
    def name(self) -> str:
        """For example ``8x3*16 beside 1*16x24 for 20%``."""
        rest = 1 - self.share / SHARES
        return f"{self.one.name} beside {self.other.name} for {rest:.0%}"

    def build(self, parties: Sequence[Layout], one_shots: tuple[int, int] = (0, 0)) -> Built:
        """The steps among parties in depth-first order, and the layout behind them.

        Args:
            parties: their layouts.
            one_shots: so many of the last stages of each grid are one-shot.
        """
        one = self.one.build(parties, one_shots[0])
        other = self.other.build(parties, one_shots[1])
        return beside(one, other, self.share, late=self.late)


class GridCosts:
    """Estimates all grids below one point, whose children are alike.

    What a stage costs on the whole payload is evaluated once; plans are made of its shares. That is
    exact where the ranks below a child are alike too; of two plans it is at least what both do to
    each link, and less than the truth where they meet in a queue.

    Args:
        evaluator: of the network.
        first: the first rank below the point.
        ranks: below each child.
        children: how many there are.
        payload_bytes: on each rank.
        chunks: whether chunks of the payload may follow one another.
    """

    def __init__(
        self,
        evaluator: PlanEvaluator,
        first: int,
        ranks: int,
        children: int,
        *,
        payload_bytes: float,
        chunks: bool,
    ) -> None:
        self._payload, self._most_chunks = payload_bytes, MOST_CHUNKS if chunks else 1
        self._evaluator, self._first = evaluator, first
        self._parties = [Layout.whole(rank) for rank in range(ranks * children)]
        self._grids = list(grids(ranks, children))
        stages = sorted({stage for grid in self._grids for stage in grid.stages})
        row = {stage: number for number, stage in enumerate(stages)}
        costs = [evaluator.both(_only(stage, ranks, children).shifted(first)) for stage in stages]
        links = np.array(
            [[np.append(c.up_busy, c.down_busy) for c in both] for both in costs]
        )  # by stage, phase and link
        memory = np.array([both[0].memory_busy for both in costs])
        links, memory = _unlike(links), _unlike(memory)
        self._stages = np.array([len(grid.stages) for grid in self._grids])
        self._links = np.zeros((len(self._grids), MOST_STAGES, *links.shape[1:]))
        self._memory = np.zeros((len(self._grids), MOST_STAGES, memory.shape[1]))
        self._latency_s = np.zeros(len(self._grids))
        self._messages_s = np.zeros(len(self._grids))
        for number, grid in enumerate(self._grids):
            left = 1.0
            for place, stage in enumerate(grid.stages):
                self._links[number, place] = left * links[row[stage]]
                self._memory[number, place] = left * memory[row[stage]]
                self._latency_s[number] += sum(cost.latency_s for cost in costs[row[stage]])
                self._messages_s[number] += sum(cost.messages_s for cost in costs[row[stage]])
                left /= prod(stage)
        times_s = self._seconds(self._links, self._memory, self._latency_s, self._messages_s)
        self._ranked = np.argsort(times_s, kind="stable")

    def best(self, count: int) -> list[Grid]:
        """The grids that are fastest by the estimate."""
        return [self._grids[index] for index in self._ranked[:count].tolist()]

    def side_by_side(self, below_s: float) -> Pair | None:
        """The two grids that are fastest together, if that is below a time."""
        found = None
        for estimate_s, pair in self.pairs(below_s):
            if estimate_s > below_s * NEAR:
                break
            time_s, shared = self._shared_out(pair)
            if time_s < below_s:
                below_s, found = time_s, shared
        return found

    def pairs(self, below_s: float) -> list[tuple[float, Pair]]:
        """Those that come first by the estimate, which is below a time."""
        found: list[tuple[float, Pair]] = []
        for one in self._ranked[:FIRST].tolist():
            most = int(self._stages[one])
            for stages in range(1, most + 1):
                others = np.flatnonzero(self._stages == stages)
                for behind in sorted({0, most - stages}):
                    times_s = self._beside(one, others, behind)
                    best, least_s = times_s.argmin(axis=0), times_s.min(axis=0)
                    for place in np.flatnonzero(least_s < below_s).tolist():
                        other = self._grids[int(others[place])]
                        share = round(SHARES * float(COARSE[best[place]]))
                        pair = Pair(self._grids[one], other, share, behind > 0)
                        found.append((float(least_s[place]), pair))
        return sorted(found, key=lambda each: each[0])[:MOST_PAIRS]

    def _shared_out(self, pair: Pair) -> tuple[float, Pair]:
        """The best share of a pair, and its time with it.

        What meets where does not depend on the share, so that all busy times are linear in it: two
        evaluations tell them all.
        """
        ends = (0.25, 0.75)
        costs = [self._costs(replace(pair, share=round(SHARES * end))) for end in ends]
        stages = len(pair.one.stages)
        links = np.array([[np.append(c.up_busy, c.down_busy) for c in each] for each in costs])
        links = _unlike(links).reshape(2, stages, 2, -1)
        memory = _unlike(np.array([[c.memory_busy for c in each[::2]] for each in costs]))
        along = (FINE - ends[0]) / (ends[1] - ends[0])
        times_s = self._seconds(
            links[0] + along[:, None, None, None] * (links[1] - links[0]),
            memory[0] + along[:, None, None] * (memory[1] - memory[0]),
            sum(cost.latency_s for cost in costs[0]),
            sum(cost.messages_s for cost in costs[0]),
        )
        best = int(times_s.argmin())
        return float(times_s[best]), replace(pair, share=round(SHARES * float(FINE[best])))

    def _costs(self, pair: Pair) -> list[ExchangeCost]:
        steps, _ = pair.build(self._parties)
        both = self._evaluator.both
        return [cost for step in steps for cost in both(step.shifted(self._first))]

    def _beside(self, one: int, others: NDArray[np.int64], behind: int) -> Floats:
        """The times of one grid beside each of others that begins so many stages later."""
        share = COARSE[:, None, None, None]
        memory = share * self._memory[one] + (1 - share) * np.roll(
            self._memory[others], behind, axis=1
        )
        share = share[..., None]
        links = share * self._links[one] + (1 - share) * np.roll(
            self._links[others], behind, axis=1
        )
        further_s = self._messages_s[others]
        latency_s = self._latency_s[one]
        if not self._evaluator.constants.processors:
            latency_s = latency_s + further_s
        return self._seconds(links, memory, latency_s, self._messages_s[one] + further_s)

    def _seconds(
        self,
        links: Floats,
        memory: Floats,
        latency_s: Floats | float,
        messages_s: Floats | float,
    ) -> Floats:
        """The times of plans by what their stages cost (…, stages, phases, links).

        Args:
            links: how long each is busy for each byte.
            memory: likewise each rank's.
            latency_s: of all rounds and messages, as in `ExchangeCost`.
            messages_s: of the messages, which each further chunk sends again.
        """
        slope = links.max(axis=-1).sum(axis=(-1, -2)) + memory.max(axis=-1).sum(axis=-1)
        busy = np.maximum(links.sum(axis=(-3, -2)).max(axis=-1), memory.sum(axis=-2).max(axis=-1))
        constants = self._evaluator.constants
        overlapped_s = messages_s if constants.processors else 0.0
        best = np.full(slope.shape, np.inf)
        chunks = 1
        while chunks <= self._most_chunks:
            part = self._payload / chunks
            first_s = np.maximum(overlapped_s, part * slope)
            further_s = constants.alpha_s + np.maximum(messages_s, part * busy)
            best = np.minimum(best, latency_s + first_s + (chunks - 1) * further_s)
            chunks *= 2
        return best


def _only(stage: Stage, ranks: int, children: int) -> Step:
    """The groups of one stage on the whole payload, all at the same time."""
    (a, b), count = stage, ranks * children
    size = a * b
    members = Grid((stage, (ranks // a, children // b))).places
    groups = np.repeat(np.arange(count // size), size)
    cuts = np.array([UNIT * part // size for part in range(size + 1)])
    begin, end = (np.tile(each, count // size) for each in (cuts[:-1], cuts[1:]))
    direct = np.zeros(count // size, dtype=np.bool_)
    return Step(groups, members, groups, members, begin, end, direct, direct)


def _unlike(busy: Floats) -> Floats:
    """Without the links, or memories, that are busy as another one is (…, K)."""
    flat = busy.reshape(-1, busy.shape[-1])
    scale = flat.max() or 1.0
    _, kept = np.unique(np.round(flat / scale, 9), axis=1, return_index=True)
    return busy[..., np.sort(kept)]
