"""The thresholds of pruning: the paper's, and those that compare like with like."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque

_REMEMBERED = 256
_ENOUGH = 16

LOWEST_SHARE = 0.2
"""Of branches that were as far, those that are pruned while none of their own has finished."""

_HIGHEST_RANK = 0.9
_GOOD_RANK = 0.6
"""From here on a finished branch may be the only one left."""


class PaperBars:
    """Two fixed thresholds (SART, two-phase pruning).

    Args:
        alpha: the threshold while no branch has finished.
    """

    among_siblings = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """The same for every length."""
        return self._alpha

    def exploiting(self, first_score: float, tokens: int) -> float:
        """The first finished branch's score (alpha'), which never lowers the bar."""
        return max(self._alpha, first_score)

    def survivors(self, best_score: float | None) -> int:
        """One, whatever has finished."""
        return 1


class FixedBar:
    """One threshold for all, whoever has finished.

    Args:
        alpha: the threshold; minus infinity prunes nothing.
    """

    among_siblings = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """The same for every length."""
        return self._alpha

    def exploiting(self, first_score: float, tokens: int) -> float:
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


class History:
    """The recent scores of all requests' branches, by length, and of those that finished.

    A score of half a text and one of a whole text are on different scales, so each is only ever
    compared with those of about its length (powers of two of ``score_every``).
    """

    def __init__(self) -> None:
        self._by_length: dict[int, Recent] = {}
        self.finished = Recent()

    def at(self, tokens: int) -> Recent:
        """The scores of branches of about so many tokens."""
        return self._by_length.setdefault(tokens.bit_length(), Recent())


class LikeWithLike:
    """Thresholds of safe mode: a branch is compared with others that were as far as it is.

    Those are of all requests, so that the branches of a hard question score low together: its own
    siblings have a say too.

    Args:
        history: the recent scores.
        alpha: a fixed threshold while no branch has finished; the lowest fifth by default.
    """

    among_siblings = True

    def __init__(self, history: History, alpha: float | None) -> None:
        self._history = history
        self._alpha = alpha

    def exploring(self, tokens: int) -> float:
        """Alpha, or what one in five branches of this length scores less than."""
        if self._alpha is not None:
            return self._alpha
        return self._history.at(tokens).quantile(LOWEST_SHARE)

    def exploiting(self, first_score: float, tokens: int) -> float:
        """What has the same rank among branches of this length as the first has among finished."""
        rank = min(self._history.finished.rank(first_score), _HIGHEST_RANK)
        return max(self.exploring(tokens), self._history.at(tokens).quantile(rank))

    def survivors(self, best_score: float | None) -> int:
        """Two, until a branch has finished that is better than most: it may be the only one."""
        known = best_score is not None and len(self._history.finished) > 0
        good = known and self._history.finished.rank(best_score or 0.0) >= _GOOD_RANK
        return 1 if good else 2
