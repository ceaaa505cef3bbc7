"""The thresholds of pruning: the paper's, and those that compare like with like."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from trimtab.branches.group import length_class

_REMEMBERED = 256
_ENOUGH = 16

LOWEST_SHARE = 0.1
"""Of branches that were as far, those that are pruned while none of their own has finished."""

_WORTH_WAITING = 0.15
"""Standard deviations of a finished branch's score by which a live one must be expected to raise
the best, to go on."""

_FEWEST_PAIRS = 24
_FIRST_CORRELATION = 0.6
_WEAKEST, _STRONGEST = 0.2, 0.97
_NORMAL = NormalDist()


class PaperBars:
    """Two fixed thresholds (SART, two-phase pruning).

    Args:
        alpha: the threshold while no branch has finished.
    """

    among_siblings = False
    at_once = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """The same for every length."""
        return self._alpha

    def exploiting(self, first: float, best: float, tokens: int) -> float:
        """The first finished branch's score (alpha'), which never lowers the bar."""
        return max(self._alpha, first)

    def survivors(self, best_score: float | None) -> int:
        """One, whatever has finished."""
        return 1


class FixedBar:
    """One threshold for all, whoever has finished.

    Args:
        alpha: the threshold; minus infinity prunes nothing.
    """

    among_siblings = False
    at_once = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """The same for every length."""
        return self._alpha

    def exploiting(self, first: float, best: float, tokens: int) -> float:
        """The same before and after a first branch has finished."""
        return self._alpha

    def survivors(self, best_score: float | None) -> int:
        """One, whatever has finished."""
        return 1


class Recent:
    """The last scores of one kind, in order."""

    def __init__(self) -> None:
        self._by_age: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, score: float) -> None:
        """Takes a score in, and forgets the oldest of too many."""
        self._by_age.append(score)
        insort(self._sorted, score)
        if len(self._sorted) > _REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._by_age.popleft())]

    def quantile(self, share: float) -> float:
        """The score that this share of them lies under; minus infinity with too few of them."""
        if len(self._sorted) < _ENOUGH:
            return -math.inf
        return self._sorted[min(int(share * len(self._sorted)), len(self._sorted) - 1)]

    def rank(self, score: float) -> float:
        """The share of them that lies at or under a score."""
        return bisect_right(self._sorted, score) / len(self._sorted) if self._sorted else 0.0


class Pairs:
    """Scores in the middle of texts and at their ends: how much the one tells of the other."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._new = 0
        self._known = _FIRST_CORRELATION

    def add(self, score: float, final: float) -> None:
        """A branch that scored this in the middle has finished with that."""
        self._pairs.append((score, final))
        self._new += 1

    def correlation(self) -> float:
        """That of their ranks as normal deviates; a guess while there are few."""
        if len(self._pairs) >= _FEWEST_PAIRS and self._new >= _FEWEST_PAIRS // 3:
            self._new = 0
            middles, ends = zip(*self._pairs, strict=True)
            found = float(np.corrcoef(_deviates(middles), _deviates(ends))[0, 1])
            self._known = min(max(found, _WEAKEST), _STRONGEST)
        return self._known


def _deviates(scores: Sequence[float]) -> NDArray[np.float64]:
    """Ranks as normal deviates; ties in their order."""
    ranks = (np.argsort(np.argsort(scores)) + 0.5) / len(scores)
    return np.array([_NORMAL.inv_cdf(rank) for rank in ranks.tolist()])


class History:
    """The recent scores of all requests' branches, by length, and of those that finished.

    A score of half a text and one of a whole text are on different scales, so each is only ever
    compared with those of about its length.
    """

    def __init__(self) -> None:
        self._by_length: dict[int, Recent] = {}
        self._pairs: defaultdict[int, Pairs] = defaultdict(Pairs)
        self.finished = Recent()

    def at(self, tokens: int) -> Recent:
        """The scores of branches of about so many tokens."""
        return self._by_length.setdefault(length_class(tokens), Recent())

    def finish(self, trail: Mapping[int, float], final: float) -> None:
        """A branch has finished; ``trail`` has its score at each length before."""
        self.finished.add(final)
        for length, score in trail.items():
            self._pairs[length].add(score, final)

    def correlation(self, tokens: int) -> float:
        """How much a score of about so many tokens tells of the final one."""
        return self._pairs[length_class(tokens)].correlation()


_STEP = 0.01
_LOSSES = [
    _NORMAL.pdf(n * _STEP) - n * _STEP * (1 - _NORMAL.cdf(n * _STEP)) for n in range(-600, 601)
]
"""The unit normal loss ``E[(Z - u)+]`` for u from -6 to 6; it falls."""


def _where_loss_is(value: float) -> float:
    """The ``u`` whose unit normal loss is this."""
    place = bisect_left(_LOSSES, -value, key=lambda loss: -loss)
    return (min(place, len(_LOSSES) - 1) - 600) * _STEP


class LikeWithLike:
    """Thresholds of safe mode: a branch is compared with others that were as far as it is.

    Once branches have finished, one that lives is worth waiting for as long as it is expected to
    raise the best score by more than a little. Ranks as normal deviates, its final ``Z`` is
    distributed as ``N(r z, 1 - r^2)``, where ``z`` is its present one and ``r`` how much scores at
    this length told of final ones lately; with the best ``b`` so far the gain is ``E[(Z - b)+]``.
    A weak signal in the middle of texts so prunes little, and a very good branch ends its siblings.

    Args:
        history: the recent scores.
        alpha: a fixed threshold while no branch has finished; the lowest tenth by default.
    """

    among_siblings = True
    """Recent scores are of all requests: a hard question's branches score low together."""

    at_once = True

    def __init__(self, history: History, alpha: float | None) -> None:
        self._history = history
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """Alpha, or what one in ten branches of this length scores less than."""
        if self._alpha is not None:
            return self._alpha
        return self._history.at(tokens).quantile(LOWEST_SHARE)

    def exploiting(self, first: float, best: float, tokens: int) -> float:
        """The score at this length from which on the best is expected to be raised enough."""
        finished = self._history.finished
        if len(finished) < _ENOUGH:
            return self.exploring(tokens)
        correlation = self._history.correlation(tokens)
        spread = math.sqrt(1 - correlation**2)
        rank = (finished.rank(best) * len(finished) + 0.5) / (len(finished) + 1)
        expected = _NORMAL.inv_cdf(rank) - spread * _where_loss_is(_WORTH_WAITING / spread)
        share = _NORMAL.cdf(expected / correlation)
        return max(self.exploring(tokens), self._history.at(tokens).quantile(share))

    def survivors(self, best_score: float | None) -> int:
        """Two, until a branch has finished: it may be the only one left."""
        return 2 if best_score is None else 1
