"""GenTree: an AllReduce plan grown from the leaves of a network up (arXiv:2409.04202).

At each switch every basic plan type is tried on what its children left, after every rearrangement
of their data, and GenModel chooses. The paper's recursion keeps the best at each switch; the search
here also keeps what is second best for now, tries plans that ignore the switches below, and lets
chunks of the payload follow one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from trimtab.core.collectives import Layout, NetworkTree, Step
from trimtab.core.collectives.combine import concentrated
from trimtab.core.collectives.schedule import merged
from trimtab.core.cost import Constants, ExchangeCost, GenModel, PlanCost, PlanEvaluator
from trimtab.core.cost.plan_cost import total
from trimtab.gentree.equal_parts import equal_parts, has_equal_parts, towards_equal_parts
from trimtab.gentree.grids import Grid, GridCosts, Pair
from trimtab.gentree.schemes import Scheme, one_shot_name, schemes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Search:
    """How far the search goes.

    Attributes:
        kept: plans that are kept for each kind of subtree.
        flat: whether plans that ignore the switches below are tried, and those whose stages take
            part of the ranks below each of part of the switches.
        chunks: whether chunks of the payload may follow one another.
        beside: whether two such plans may share the payload.
        one_shot: whether ranks may be sent all that others hold in the last rounds.
        equal: whether the reduce-scatter must leave each rank one equal part of the payload.
    """

    kept: int = 3
    flat: bool = True
    chunks: bool = True
    beside: bool = True
    one_shot: bool = True
    equal: bool = False


LARGE = 1024
"""Networks of more ranks are searched less widely."""

TRIED, TRIED_LARGE = 12, 6
"""Staged plans that are tried at each switch."""

GRIDS = 4
"""Plans of such stages that are tried alone."""

WORTH = 0.99
"""Two plans side by side make more and smaller messages, so that they must be so much faster."""

PAPER = Search(kept=1, flat=False, chunks=False, one_shot=False)
"""The paper's recursion."""


@dataclass(frozen=True)
class Growth:
    """A plan for the ranks below one point, which are numbered from 0.

    Attributes:
        steps: of its reduce-scatter.
        layout: who owns what behind them.
        choices: what each switch does, by name, from the lowest.
        cost: of the steps and their mirror.
        up, down: how long the links below the point are busy for each byte, the point's own
            first, which is 0.
        memory: likewise each rank's memory.
    """

    steps: list[Step]
    layout: Layout
    choices: tuple[tuple[str, str], ...]
    cost: PlanCost
    up: Floats
    down: Floats
    memory: Floats

    @property
    def is_one_shot(self) -> bool:
        """Whether any of it is in one shot."""
        return any(step.one_shot.any() for step in self.steps)

    def seconds(self, payload_bytes: float, chunks: bool) -> float:
        """How long it takes."""
        count = self.cost.best_chunks(payload_bytes) if chunks else 1
        return self.cost.seconds(payload_bytes, count)


class GenTree:
    """Grows plans for one network and one size of the payload.

    Args:
        tree: the network.
        constants: of GenModel.
        payload_bytes: on each rank.
        search: how far it goes.
    """

    def __init__(
        self,
        tree: NetworkTree,
        constants: Constants,
        payload_bytes: float,
        search: Search | None = None,
    ) -> None:
        self._tree, self._constants, self._payload = tree, constants, payload_bytes
        self._search = search or Search()
        self._evaluator = PlanEvaluator(tree, constants)
        self._nothing = total([], constants)
        self._grown: dict[int, list[Growth]] = {}

    def best(self) -> Growth:
        """The best plan for all ranks, of those kept the one that costs least as a whole.

        What the children of a switch do at the same time is costed side by side until then, as if
        each waited for the slowest.
        """
        kept = [
            replace(growth, cost=self._evaluator.cost(growth.steps)) for growth in self._grow(0)
        ]
        return min(kept, key=self._seconds)

    def _grow(self, point: int) -> list[Growth]:
        """The best plans for the ranks below a point, the best one first."""
        kind = self._kinds[point]
        if kind not in self._grown:
            found = list(self._candidates(point))
            if self._search.flat and self._is_grid(point):
                # Pairs are compared before either has stages in one shot.
                plain = [growth for growth in found if not growth.is_one_shot]
                found += self._in_grids(point, min(map(self._seconds, plain)))
            if self._search.equal:
                # Stages of children that are unlike may be cut an unequal bit off one another.
                found = [growth for growth in found if has_equal_parts(growth.layout)]
            self._grown[kind] = self._best(found)
        return self._grown[kind]

    def _seconds(self, growth: Growth) -> float:
        return growth.seconds(self._payload, self._search.chunks)

    def _candidates(self, point: int) -> Iterator[Growth]:
        children = self._tree.children[point]
        if not children:
            yield _leaf(self._nothing)
            return
        if not self._search.equal or self._same_ranks(children):
            plans = [self._grow(child) for child in children]
            for choice in range(max(map(len, plans))):
                chosen = [p[min(choice, len(p) - 1)] for p in plans]
                for together in self._rearranged(point, chosen):
                    yield from self._joined(point, together)
        elif self._tree.size <= LARGE:
            first, last = self._tree.spans[point]
            steps = towards_equal_parts(self._tree, point)
            below, layout = self._together_of_leaves(point), equal_parts(last - first)
            yield self._with(point, below, steps, layout, "equal parts")
        either = self._search.flat or self._search.equal
        if either and any(self._tree.children[child] for child in children):
            yield from self._flat(point)

    def _same_ranks(self, points: Sequence[int]) -> bool:
        """Whether there are as many ranks below each of some points."""
        spans = [self._tree.spans[point] for point in points]
        return len({last - first for first, last in spans}) == 1

    def _joined(self, point: int, below: _Together) -> Iterator[Growth]:
        """Each basic plan type at one switch, behind what its children do."""
        children = self._tree.children[point]
        if len(children) == 1:
            yield below.growth(below.parties[0])
            return
        beta = self._tree.up_s_per_byte
        for scheme in self._schemes(point, [float(beta[child]) for child in children]):
            yield self._behind(point, below, scheme, scheme.name)

    def _flat(self, point: int) -> Iterator[Growth]:
        """Plans of the ranks below a point as if they hung on one switch, in depth-first order."""
        first, last = self._tree.spans[point]
        below = self._together_of_leaves(point)
        beta = self._tree.up_s_per_byte
        betas = [float(beta[leaf]) for leaf in self._tree.leaves[first:last]]
        for scheme in self._schemes(point, betas):
            yield self._behind(point, below, scheme, f"flat {scheme.name}")

    def _together_of_leaves(self, point: int) -> _Together:
        first, last = self._tree.spans[point]
        parties = [Layout.whole(rank) for rank in range(last - first)]
        return _Together.of_leaves(parties, self._size(point), self._nothing)

    def _is_grid(self, point: int) -> bool:
        """Whether a point has children that are alike, with several ranks below each."""
        children = self._tree.children[point]
        if len(children) < 2 or self._tree.size > LARGE or not self._tree.children[children[0]]:
            return False
        first, last = self._tree.spans[children[0]]
        return last - first > 1 and len({(self._kinds[c], *self._link(c)) for c in children}) == 1

    def _in_grids(self, point: int, best_s: float) -> Iterator[Growth]:
        """Plans whose stages take part of the ranks below part of the children at a time.

        Args:
            point: whose children are alike.
            best_s: the time of the best plan so far that does not end in one shot.
        """
        first, last = self._tree.spans[point]
        children = len(self._tree.children[point])
        costs = GridCosts(
            self._evaluator,
            first,
            (last - first) // children,
            children,
            payload_bytes=self._payload,
            chunks=self._search.chunks,
        )
        below = self._together_of_leaves(point)
        for grid in costs.best(GRIDS):
            growth = self._behind(point, below, Scheme(grid.name, grid.build), f"flat {grid.name}")
            best_s = min(best_s, self._seconds(growth))
            yield growth
            for scheme in self._in_one_shot(point, grid):
                yield self._behind(point, below, scheme, f"flat {scheme.name}")
        pair = costs.side_by_side(WORTH * best_s) if self._search.beside else None
        if pair is not None:
            yield self._behind(point, below, Scheme(pair.name, pair.build), f"flat {pair.name}")
            for scheme in self._pair_in_one_shot(point, pair):
                yield self._behind(point, below, scheme, f"flat {scheme.name}")

    def _in_one_shot(self, point: int, grid: Grid) -> list[Scheme]:
        """The same stages with the last ones in one shot."""
        if not self._ends_in_one_shot(point):
            return []
        return [
            Scheme(one_shot_name(grid.name, count), partial(grid.build, one_shots=count))
            for count in range(1, len(grid.stages) + 1)
        ]

    def _pair_in_one_shot(self, point: int, pair: Pair) -> list[Scheme]:
        """The same two plans with the last stage of either or both in one shot."""
        if not self._ends_in_one_shot(point):
            return []
        return [
            Scheme(
                f"{pair.name}, last {one} and {other} in one shot",
                partial(pair.build, one_shots=(one, other)),
            )
            for one, other in ((1, 0), (0, 1), (1, 1))
        ]

    def _ends_in_one_shot(self, point: int) -> bool:
        """Whether one-shot stages may end what is done below a point: no others may follow."""
        return point == 0 and self._search.one_shot and not self._search.equal

    def _schemes(self, point: int, betas: Sequence[float]) -> list[Scheme]:
        given = self._constants
        beta = given.beta_ratio * max(betas)
        sharing = len(betas) / given.processors if given.processors else 1
        model = GenModel(
            given.alpha_s,
            beta,
            given.gamma_s_per_byte,
            given.delta_s_per_byte or 0.0,
            beta * given.epsilon_ratio,
            given.incast_threshold,
            sharing * given.message_s,
        )
        most = TRIED if self._tree.size <= LARGE else TRIED_LARGE
        return schemes(
            len(betas),
            self._payload,
            model,
            betas,
            most,
            equal=self._search.equal,
            one_shot=self._ends_in_one_shot(point),
        )

    def _behind(self, point: int, below: _Together, scheme: Scheme, name: str) -> Growth:
        steps, layout = scheme.build(below.parties)
        return self._with(point, below, steps, layout, name)

    def _with(
        self, point: int, below: _Together, steps: Sequence[Step], layout: Layout, name: str
    ) -> Growth:
        first, _ = self._tree.spans[point]
        size = self._size(point)
        costs = [cost for step in steps for cost in self._evaluator.both(step.shifted(first))]
        return below.grown(
            steps,
            layout,
            (*below.choices, (self._tree.names[point], name)),
            costs,
            point,
            size,
            first,
        )

    def _rearranged(self, point: int, chosen: Sequence[Growth]) -> Iterator[_Together]:
        """What the children do, as it is, and with the data of each moved to fewer of its ranks."""
        children = self._tree.children[point]
        first, _ = self._tree.spans[point]
        offsets = [self._tree.spans[child][0] - first for child in children]
        yield _Together.of(chosen, offsets, nothing=self._nothing)
        if self._search.equal:
            return
        smallest = min(len(set(growth.layout.owners.tolist())) for growth in chosen)
        counts = [self._fewest(child) for child in children] + [smallest]
        for few in sorted(set(counts)):
            # Children that are alike do alike; their plan names the first of them.
            once: dict[tuple[int, int], Growth] = {}
            for child, growth in zip(children, chosen, strict=True):
                key = self._kinds[child], id(growth)
                if key not in once:
                    once[key] = self._concentrated(child, growth, few)
            moved = [
                once[self._kinds[child], id(growth)]
                for child, growth in zip(children, chosen, strict=True)
            ]
            if any(after is not before for after, before in zip(moved, chosen, strict=True)):
                yield _Together.of(moved, offsets, nothing=self._nothing)

    def _fewest(self, child: int) -> int:
        """The fewest ranks that fill a point's link up; all if its own ranks are no faster."""
        first, last = self._tree.spans[child]
        slowest = max(
            float(self._tree.up_s_per_byte[leaf]) for leaf in self._tree.leaves[first:last]
        )
        own = float(self._tree.up_s_per_byte[child])
        if own <= 0 or slowest <= 0 or last - first < 2:
            return last - first
        return max(1, min(last - first, round(slowest / own)))

    def _concentrated(self, child: int, growth: Growth, few: int) -> Growth:
        owners = sorted(set(growth.layout.owners.tolist()))
        if len(owners) <= few:
            return growth
        spread = [owners[len(owners) * index // few] for index in range(few)]
        moved = concentrated(growth.layout, spread)
        if moved is None:
            return growth
        step, layout = moved
        below = _Together.of([growth], [0], nothing=self._nothing, own_point=False)
        name = f"concentrate on {few}"
        return self._with(child, below, [step], layout, name)

    def _best(self, candidates: Iterable[Growth]) -> list[Growth]:
        """The fastest plans, of which no two own and cost the same."""
        payload, chunks = self._payload, self._search.chunks
        seen: dict[tuple[int, str], Growth] = {}
        for growth in candidates:
            about = f"{growth.seconds(payload, chunks):.9e}"
            seen.setdefault((len(growth.layout.owners), about), growth)
        ranked = sorted(seen.values(), key=lambda g: (g.seconds(payload, chunks), g.cost.rounds))
        large = self._tree.size > LARGE
        found = ranked[: 1 if large else self._search.kept]
        if self._search.kept > 1:
            # One that is best alone, without chunks, may be best below other switches.
            alone = min(ranked, key=lambda g: g.seconds(payload, chunks=False))
            found += [] if any(alone is growth for growth in found) else [alone]
        return found

    def _size(self, point: int) -> int:
        """How many points there are at and below a point."""
        return self._sizes[point]

    @cached_property
    def _sizes(self) -> list[int]:
        sizes = [1] * len(self._tree.names)
        for point in range(len(sizes) - 1, 0, -1):
            sizes[self._tree.parents[point]] += sizes[point]
        return sizes

    @cached_property
    def _kinds(self) -> list[int]:
        """A number for each point, the same for points below which all is alike."""
        tree, numbers = self._tree, dict[object, int]()
        memory = dict(zip(tree.leaves, tree.memory_bytes_per_s, strict=False))
        kinds = [0] * len(tree.names)
        for point in range(len(tree.names) - 1, -1, -1):
            key: object = memory.get(point, 0.0)
            if tree.children[point]:
                key = tuple((kinds[child], *self._link(child)) for child in tree.children[point])
            kinds[point] = numbers.setdefault(key, len(numbers))
        return kinds

    def _link(self, point: int) -> tuple[float, float, float]:
        """The link to a point's parent."""
        tree = self._tree
        columns = (tree.up_s_per_byte, tree.down_s_per_byte, tree.latency_s)
        up, down, latency_s = (float(column[point]) for column in columns)
        return up, down, latency_s


@dataclass(frozen=True)
class _Together:
    """What the children of a point do at the same time.

    Attributes:
        steps: of all of them.
        parties: their layouts.
        choices: of one of each kind.
        latency_s, slope, rounds, width: of the slowest.
        messages_s: of the slowest, for its messages, or of all on processors that they share.
        nothing: the cost of no steps.
        up, down, memory: as in `Growth`, of the point above.
    """

    steps: list[Step]
    parties: list[Layout]
    choices: tuple[tuple[str, str], ...]
    latency_s: float
    slope: float
    rounds: int
    width: int
    messages_s: float
    nothing: PlanCost
    up: Floats
    down: Floats
    memory: Floats

    @classmethod
    def of(
        cls,
        chosen: Sequence[Growth],
        offsets: Sequence[int],
        *,
        nothing: PlanCost,
        own_point: bool = True,
    ) -> _Together:
        above = [np.zeros(1)] if own_point else []
        messages = [growth.cost.messages_s for growth in chosen]
        return cls(
            merged(
                [step.shifted(by) for step in growth.steps]
                for growth, by in zip(chosen, offsets, strict=True)
            ),
            [growth.layout.shifted(by) for growth, by in zip(chosen, offsets, strict=True)],
            tuple(dict.fromkeys(c for growth in chosen for c in growth.choices)),
            max(growth.cost.latency_s for growth in chosen),
            max(growth.cost.seconds_per_byte for growth in chosen),
            max(growth.cost.rounds for growth in chosen),
            max(growth.cost.width for growth in chosen),
            sum(messages) if nothing.shares_processors else max(messages),
            nothing,
            np.concatenate([*above, *(growth.up for growth in chosen)]),
            np.concatenate([*above, *(growth.down for growth in chosen)]),
            np.concatenate([growth.memory for growth in chosen]),
        )

    @classmethod
    def of_leaves(cls, parties: list[Layout], points: int, nothing: PlanCost) -> _Together:
        unused = np.zeros(points)
        idle = np.zeros(len(parties))
        return cls([], parties, (), 0.0, 0.0, 0, 1, 0.0, nothing, unused, unused, idle)

    def growth(self, layout: Layout) -> Growth:
        busy = max(self.up.max(), self.down.max(), self.memory.max())
        cost = PlanCost(
            self.rounds,
            self.latency_s,
            self.slope,
            float(busy),
            self.nothing.alpha_s,
            self.messages_s,
            self.width,
            self.nothing.shares_processors,
        )
        return Growth(self.steps, layout, self.choices, cost, self.up, self.down, self.memory)

    def grown(
        self,
        steps: Sequence[Step],
        layout: Layout,
        choices: tuple[tuple[str, str], ...],
        costs: Sequence[ExchangeCost],
        point: int,
        size: int,
        first: int,
    ) -> Growth:
        """With more steps behind, whose costs are those on the whole network."""
        points = slice(point, point + size)
        ranks = slice(first, first + len(self.memory))
        later = replace(
            self,
            steps=[*self.steps, *steps],
            choices=choices,
            latency_s=self.latency_s + sum(c.latency_s for c in costs),
            slope=self.slope + sum(c.seconds_per_byte for c in costs),
            rounds=self.rounds + sum(c.rounds for c in costs),
            messages_s=self.messages_s + sum(c.messages_s for c in costs),
            width=max(self.width, *(c.width for c in costs)),
            up=self.up + sum(c.up_busy[points] for c in costs),
            down=self.down + sum(c.down_busy[points] for c in costs),
            memory=self.memory + sum(c.memory_busy[ranks] for c in costs),
        )
        return later.growth(layout)


def _leaf(nothing: PlanCost) -> Growth:
    return Growth([], Layout.whole(0), (), nothing, np.zeros(1), np.zeros(1), np.zeros(1))
