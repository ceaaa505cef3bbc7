"""Fewer branches while others wait: how many finished ones then answer a request.

A request of which only ``n`` of ``N`` branches have got a seat may take no larger part of the
tokens that it asked for: it is answered after the most branches ``m`` whose expected token bill
``W(n, m)`` is within ``n / N`` of ``W(N, M)``. For exponential lengths that is ``m = M n / N``; for
nearly constant ones more finished branches cost little more, and ``m`` stays close to ``n``.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from trimtab.branches.lengths import kaplan_meier
from trimtab.branches.order_statistics import LengthDistribution, group_cost

_REMEMBERED = 512
_NEEDED = 32
_RENEWED_AFTER = 128
_POINTS = 64


class Bend:
    """Learns branch lengths, and says after how many finished branches a request is answered."""

    def __init__(self) -> None:
        self._ends: deque[tuple[int, bool]] = deque(maxlen=_REMEMBERED)
        self._new = 0
        self._distribution: LengthDistribution | None = None
        self._known: dict[tuple[int, int, int], int] = {}

    def learn(self, tokens: int, *, whole: bool) -> None:
        """A branch has ended with so many tokens; not ``whole`` if it was ended before its time."""
        if tokens < 1:
            return
        self._ends.append((tokens, whole))
        self._new += whole
        if self._new >= (_NEEDED if self._distribution is None else _RENEWED_AFTER):
            self._new = 0
            self._known.clear()
            self._distribution = _few_points(kaplan_meier(*zip(*self._ends, strict=True)))

    def enough(self, seats: int, branches: int, enough: int) -> int:
        """The finished branches that answer a request with so many of its branches running."""
        if seats >= branches:
            return enough
        question = (seats, branches, enough)
        if question not in self._known:
            self._known[question] = self._affordable(*question)
        return self._known[question]

    def _affordable(self, seats: int, branches: int, enough: int) -> int:
        lengths = self._distribution
        if lengths is None:
            return max(1, enough * seats // branches)
        budget = group_cost(lengths, branches, enough).tokens * seats / branches
        most = min(enough, seats)
        fitting = (m for m in range(most, 1, -1) if group_cost(lengths, seats, m).tokens <= budget)
        return next(fitting, 1)


def _few_points(lengths: LengthDistribution) -> LengthDistribution:
    """A distribution on few enough points to be reckoned with in the engine's loop."""
    shares = (np.arange(_POINTS) + 0.5) / _POINTS
    places = np.minimum(np.searchsorted(lengths.cumulative, shares), len(lengths.tokens) - 1)
    return LengthDistribution.of_samples(lengths.tokens[places])
