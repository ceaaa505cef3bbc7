"""When the vote of a request's finished branches is decided before all of them have voted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import comb


def certainty(votes: Iterable[str]) -> float:
    """How sure it is that the leading answer is the more frequent one of the two in front.

    With ``a`` votes against ``b``, and before them no idea which is the more frequent, the share of
    the first among both is distributed as Beta(a + 1, b + 1); this is its mass above one half, the
    stopping rule of Adaptive-Consistency (arXiv:2305.11860).
    """
    counts = sorted(Counter(votes).values(), reverse=True)[:2]
    if not counts:
        return 0.0
    leading, second = counts[0], sum(counts[1:])
    throws = leading + second + 1
    favourable = sum(comb(throws, k) for k in range(leading + 1))
    return float(favourable / 2**throws)


def decided(votes: Iterable[str], to_come: int) -> bool:
    """Whether no number of votes still to come can put another answer level with the leading."""
    counts = sorted(Counter(votes).values(), reverse=True)[:2]
    return bool(counts) and counts[0] > sum(counts[1:]) + to_come
