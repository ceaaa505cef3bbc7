"""When the vote of a request's finished branches is decided before all of them have voted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from scipy.special import betaincc

_ROUNDED = 1e-6
"""Sums this close are level: the order in which votes are added must not decide."""


def sums(votes: Sequence[tuple[str, float | None]], *, weighted: bool) -> list[float]:
    """What the answers have got, the leading one first.

    Args:
        votes: answers, each with its branch's score.
        weighted: whether a vote counts as much as its score, an unknown one as the mean of the
            others; else each counts as 1.
    """
    known = [score for _, score in votes if score is not None]
    mean = fmean(known) if known else 1.0
    totals: defaultdict[str, float] = defaultdict(float)
    for answer, score in votes:
        totals[answer] += (mean if score is None else score) if weighted else 1.0
    return sorted(totals.values(), reverse=True)


def certainty(totals: Sequence[float]) -> float:
    """How sure it is that the leading answer is the more frequent one of the two in front.

    With ``a`` votes against ``b``, and before them no idea which is the more frequent, the share of
    the first among both is distributed as Beta(a + 1, b + 1); this is its mass above one half, the
    stopping rule of Adaptive-Consistency (arXiv:2305.11860). Weights of votes, none over 1, count
    as that much of a vote.
    """
    if not totals:
        return 0.0
    return float(betaincc(totals[0] + 1.0, sum(totals[1:2]) + 1.0, 0.5))


def decided(totals: Sequence[float], to_come: int) -> bool:
    """Whether no votes still to come, of 1 at most, can put another answer level with the first."""
    return bool(totals) and totals[0] > sum(totals[1:2]) + to_come + _ROUNDED
