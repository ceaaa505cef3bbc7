"""Placements as good as the best that take few nodes of jobs that may move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment

from trimtab.placement.config import Effort
from trimtab.placement.grid import Candidate
from trimtab.placement.search import Front

_SAME = 1e-9
_MOST_SHARES = 400
"""Ways to share moves out among pods, of which all are tried; where there are more, few are."""

_MOST_CELLS_IN_PODS = 400
"""Cells times pods up to which a share is searched in full where strips do not settle it."""

_FEWEST_SEARCHES, _MOST_SEARCHED = 10, 4_000_000
"""Searches for a plan, and cells times pods of all of them together; the greater of both counts."""

_NEVER = 1e12

Shares = tuple[int, ...]
"""Nodes moved of each pod."""

Solve = Callable[[Sequence[int], Effort], Front | None]
"""The front on pods of so many nodes; None where they do not hold the job, or split more blocks."""


@dataclass(frozen=True, slots=True)
class Room:
    """What pods can give.

    Attributes:
        stays: nodes of each without a move, less its spares; negative where spares need moves too.
        most: with all moves.
    """

    stays: tuple[int, ...]
    most: tuple[int, ...]

    def with_moves(self, shares: Shares) -> tuple[int, ...]:
        """The nodes of each pod after some moves."""
        return tuple(max(0, s + m) for s, m in zip(self.stays, shares, strict=True))


@dataclass(slots=True)
class FewMoves:
    """Looks for a placement with as few moves as can be, and not worse than it may be.

    Attributes:
        room: of the pods.
        cells: nodes that the job needs.
        alpha: the weight of data parallel spread.
        worst: the weighted spread that is still good enough.
        solve: makes placements by nodes.
        effort: of the searches where strips and packings do not settle a share.
    """

    room: Room
    cells: int
    alpha: float
    worst: float
    solve: Solve
    effort: Effort
    _known: dict[tuple[int, ...], Candidate | None] = field(default_factory=dict)
    _searches: int = 0

    def fewest(self, candidates: Sequence[Candidate]) -> Candidate:
        """The placement with the fewest moves that is found.

        On few pods every way to share one move less out is tried before the search ends; on many
        only those near the last.

        Args:
            candidates: placements, of which one is good enough at least.
        """
        best = self._least(candidates)
        assert best is not None  # as promised
        for pod in range(len(self.room.stays)):
            best = self._spared(best, pod)
        least = max(0, self.cells - sum(max(0, stays) for stays in self.room.stays))
        while (moves := self._moves(best)) > least:
            better = next(self._better(best, moves - 1), None)
            if better is None:
                break
            best = better
        return best

    def _spared(self, best: Candidate, pod: int) -> Candidate:
        """With as few moves in one pod as go, by halving."""
        low, high = 0, self._moved(best)[pod]
        while low < high:
            middle = (low + high) // 2
            shares = self._moved(best)
            shares[pod] = middle
            found = self._placed(tuple(shares))
            if found is None:
                low = middle + 1
            else:
                best, high = found, min(middle, self._moved(found)[pod])
        return best

    def _moved(self, candidate: Candidate) -> list[int]:
        """The moves in each pod."""
        used = self._used(candidate)
        return [max(0, n - s) if n else 0 for n, s in zip(used, self.room.stays, strict=True)]

    def _better(self, best: Candidate, moves: int) -> Iterator[Candidate]:
        """Placements with at most so many moves."""
        for shares in self._shares(best, moves):
            found = self._placed(shares)
            if found is not None and self._moves(found) <= moves:
                yield found

    def _moves(self, candidate: Candidate) -> int:
        return sum(self._moved(candidate))

    def _used(self, candidate: Candidate) -> list[int]:
        used: list[int] = np.bincount(
            candidate.grid.ravel(), minlength=len(self.room.stays)
        ).tolist()
        return used

    def _least(self, candidates: Sequence[Candidate]) -> Candidate | None:
        """Of those that are good enough, the one with the fewest moves on its best pods."""
        good = [c for c in candidates if c.spread.weighted(self.alpha) <= self.worst + _SAME]
        return min(
            (self._settled(candidate) for candidate in good),
            key=lambda c: (self._moves(c), c.spread.pipeline + c.spread.data, c.spread),
            default=None,
        )

    def _settled(self, candidate: Candidate) -> Candidate:
        """The same placement with its pods exchanged so that it needs the fewest moves."""
        used = self._used(candidate)
        holding = np.flatnonzero(used)
        need = np.array(used)[holding][:, None]
        cost = np.maximum(0, need - np.array(self.room.stays)[None, :]).astype(float)
        cost[need > np.array(self.room.most)[None, :]] = _NEVER
        if cost[np.arange(len(holding)), holding].sum() >= _NEVER:
            now = np.inf
        else:
            now = self._moves(candidate)
        at, pods = linear_sum_assignment(cost)
        if cost[at, pods].sum() >= now:
            return candidate
        renamed = np.arange(len(used))
        renamed[holding[at]] = pods
        return Candidate(renamed[candidate.grid], candidate.spread, candidate.method)

    def _placed(self, shares: Shares) -> Candidate | None:
        """A placement that is good enough with these moves."""
        nodes = self.room.with_moves(shares)
        if sum(nodes) < self.cells:
            return None
        # Pods of the same sizes in another order are the same question.
        capacities = tuple(sorted((min(n, self.cells) for n in nodes if n), reverse=True))
        if capacities not in self._known:
            size = self.cells * len(self.room.stays)
            if self._searches >= max(_FEWEST_SEARCHES, _MOST_SEARCHED // size):
                return None
            self._searches += 1
            self._known[capacities] = self._searched(capacities)
        found = self._known[capacities]
        if found is None:
            return None
        order = sorted(range(len(nodes)), key=lambda pod: -min(nodes[pod], self.cells))
        grid = np.array(order)[found.grid]
        return self._settled(Candidate(grid, found.spread, found.method))

    def _searched(self, capacities: tuple[int, ...]) -> Candidate | None:
        front = self.solve(capacities, "quick")
        if front is None or front.bound.least(self.alpha) > self.worst + _SAME:
            return None
        small = self.cells * len(capacities) <= _MOST_SEARCHED
        if front.best(self.alpha).spread.weighted(self.alpha) > self.worst + _SAME and small:
            front = self.solve(capacities, self.effort) or front
        best = front.best(self.alpha)
        return best if best.spread.weighted(self.alpha) <= self.worst + _SAME else None

    def _shares(self, best: Candidate, moves: int) -> Iterator[Shares]:
        """All ways to share so many moves out if they are few, else those near a placement's."""
        most = tuple(
            max(0, min(most, self.cells) - stays)
            for stays, most in zip(self.room.stays, self.room.most, strict=True)
        )
        ways = list(islice(_all_shares(most, moves), _MOST_SHARES + 1))
        yield from ways if len(ways) <= _MOST_SHARES else self._near(best, most)

    def _near(self, best: Candidate, most: Shares) -> Iterator[Shares]:
        """A move less in one pod; then two less in one or two, and one more in another."""
        shares = np.array(self._moved(best))
        moved = np.flatnonzero(shares)
        for pod in moved:
            yield _changed(shares, (pod,), ())
        open_pods = np.flatnonzero(shares < np.array(most))
        for one in moved:
            for other in moved[moved >= one]:
                if one != other or shares[one] > 1:
                    for more in open_pods:
                        if more not in (one, other):
                            yield _changed(shares, (one, other), (more,))


def _changed(shares: npt.NDArray[np.int64], less: tuple[int, ...], more: tuple[int, ...]) -> Shares:
    changed = shares.copy()
    np.subtract.at(changed, list(less), 1)
    np.add.at(changed, list(more), 1)
    return tuple(changed.tolist())


def _all_shares(most: Shares, moves: int) -> Iterator[Shares]:
    """All ways to share moves out among pods with so many at most."""
    open_shares: list[Shares] = [()]
    while open_shares:
        done = open_shares.pop()
        left = moves - sum(done)
        if len(done) == len(most):
            yield done
            continue
        rest = sum(most[len(done) + 1 :])
        own = range(max(0, left - rest), min(most[len(done)], left) + 1)
        open_shares += [(*done, number) for number in own]
