"""What M of N branches cost and are worth: order statistics of their lengths, and of their scores.

The lengths of a request's branches are independent draws from one distribution. When the M-th
branch ends, the others are ended too, so the request takes ``X_(M:N)`` tokens of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, comb, expit, ndtr, ndtri

from trimtab.core.errors import BadInput

Floats = NDArray[np.float64]

_CELLS = 4096
_REACH = 30.0
"""Cells of a parametric distribution are even in the logit of probability, this far both ways."""
_SCORE_GRID = np.linspace(-9.0, 15.0, 2401)
"""Scores of wrong branches are standard normal; what lies outside weighs less than 1e-18."""


@dataclass(frozen=True, eq=False)
class LengthDistribution:
    """A distribution of branch lengths on finitely many points.

    Attributes:
        tokens: the lengths, ascending; shape (points,).
        cumulative: the probability of at most so many tokens; shape (points,), the last is 1.
    """

    tokens: Floats
    cumulative: Floats

    @classmethod
    def of_samples(cls, tokens: ArrayLike, weights: ArrayLike | None = None) -> LengthDistribution:
        """The empirical distribution of lengths, each with its weight (one by default).

        Raises:
            BadInput: there is no length, or one that is not a positive number.
        """
        lengths = np.asarray(tokens, dtype=float).ravel()
        parts = np.ones_like(lengths) if weights is None else np.asarray(weights, float).ravel()
        if not len(lengths) or not np.all(np.isfinite(lengths) & (lengths > 0)):
            raise BadInput("a length is no positive number", fix="give at least one token each")
        values, index = np.unique(lengths, return_inverse=True)
        sums = np.cumsum(np.bincount(index, weights=parts))
        return cls(values, sums / sums[-1])

    @classmethod
    def of_quantiles(cls, quantile: Callable[[Floats], Floats]) -> LengthDistribution:
        """A continuous distribution by its quantile function, such as a scipy one's ``ppf``.

        The unit interval is cut into cells that get finer towards both ends.
        """
        edges = expit(np.linspace(-_REACH, _REACH, _CELLS + 1))
        middles = expit((np.linspace(-_REACH, _REACH, 2 * _CELLS + 1))[1::2])
        edges[-1] = 1.0
        return cls(np.asarray(quantile(middles), dtype=float), edges[1:])

    @cached_property
    def mean(self) -> float:
        """The mean length in tokens."""
        return float(self.tokens @ np.diff(self.cumulative, prepend=0.0))

    def order_statistic(self, m: int, n: int, power: int = 1) -> float:
        """The mean of ``X_(M:N) ** power``, exact for the points of the distribution.

        ``P(X_(M:N) <= x) = I_F(x)(M, N - M + 1)``, the regularised incomplete beta function.

        Raises:
            BadInput: M is not between 1 and N.
        """
        _check(m, n)
        steps = np.diff(betainc(m, n - m + 1, self.cumulative), prepend=0.0)
        return float(self.tokens**power @ steps)

    def scaled(self, factor: float) -> LengthDistribution:
        """The distribution of lengths that are ``factor`` times as long."""
        return LengthDistribution(self.tokens * factor, self.cumulative)

    def share_within(self, tokens: float) -> float:
        """The probability of at most so many tokens."""
        index = int(np.searchsorted(self.tokens, tokens, side="right"))
        return float(self.cumulative[index - 1]) if index else 0.0


@dataclass(frozen=True, slots=True)
class GroupCost:
    """What a request costs on average when it ends with the M-th of its N branches.

    Attributes:
        latency_tokens: tokens of the M-th branch, so decode steps until the answer: E[X_(M:N)].
        tokens: decode tokens of all branches, W: the censored total time on test.
        kv_area: tokens of KV held, summed over decode steps, A: half the sum of squares of what
            each branch decodes; the prompt is not in it.
    """

    latency_tokens: float
    tokens: float
    kv_area: float


def group_cost(lengths: LengthDistribution, n: int, m: int) -> GroupCost:
    """The mean latency, tokens and KV area of N branches that end with the M-th.

    Raises:
        BadInput: M is not between 1 and N.
    """
    _check(m, n)
    first = [lengths.order_statistic(i, n) for i in range(1, m + 1)]
    squares = [lengths.order_statistic(i, n, 2) for i in range(1, m + 1)]
    return GroupCost(
        latency_tokens=first[-1],
        tokens=sum(first) + (n - m) * first[-1],
        kv_area=(sum(squares) + (n - m) * squares[-1]) / 2,
    )


def _check(m: int, n: int) -> None:
    if not 1 <= m <= n:
        raise BadInput(f"M is {m} and N is {n}", fix="give 1 <= M <= N")


def separation(auroc: float) -> float:
    """How many standard deviations right and wrong scores are apart, both normal, at an AUROC.

    Raises:
        BadInput: the AUROC is not between 0 and 1, both excluded.
    """
    if not 0 < auroc < 1:
        raise BadInput(f"the AUROC is {auroc}", fix="give a number between 0 and 1")
    return float(np.sqrt(2.0) * ndtri(auroc))


def best_of_accuracy(accuracy: float, auroc: float, m: int) -> float:
    """The probability that the best scored of M branches is right, for normal scores.

    Args:
        accuracy: the probability that a branch is right, 0 to 1.
        auroc: the probability that a right branch scores above a wrong one.
        m: how many branches there are to choose from.

    Raises:
        BadInput: an argument is out of its range.
    """
    if not 0 <= accuracy <= 1:
        raise BadInput(f"the accuracy is {accuracy}", fix="give a number from 0 to 1")
    _check(1, m)
    apart = separation(auroc)
    # Mirrored where the scores mislead, so that the grid holds both bells.
    right = _SCORE_GRID - max(apart, 0.0)
    wrong = _SCORE_GRID - max(-apart, 0.0)
    below = accuracy * ndtr(right) + (1 - accuracy) * ndtr(wrong)
    density = np.exp(-(right**2) / 2) / np.sqrt(2 * np.pi)
    return float(
        np.clip(m * accuracy * np.trapezoid(density * below ** (m - 1), _SCORE_GRID), 0, 1)
    )


def majority_accuracy(accuracy: float, m: int) -> float:
    """The least probability that most of M answers are right: all wrong ones agree, ties are lost.

    Raises:
        BadInput: an argument is out of its range.
    """
    if not 0 <= accuracy <= 1:
        raise BadInput(f"the accuracy is {accuracy}", fix="give a number from 0 to 1")
    _check(1, m)
    right = np.arange(m // 2 + 1, m + 1)
    return float(np.sum(comb(m, right) * accuracy**right * (1 - accuracy) ** (m - right)))


def within_group_auroc(groups: Sequence[tuple[ArrayLike, ArrayLike]]) -> float | None:
    """How often a right branch scores above a wrong one of the same request; ties count half.

    Pooled over requests the figure would mostly measure how hard each request is.

    Args:
        groups: of each request the scores, and whether each branch is right.

    Returns:
        None where no request has both right and wrong branches.
    """
    above = pairs = 0.0
    for scores, correct in groups:
        values, right = np.asarray(scores, float), np.asarray(correct, bool)
        gaps = values[right][:, None] - values[~right][None, :]
        above += float((gaps > 0).sum()) + 0.5 * float((gaps == 0).sum())
        pairs += gaps.size
    return above / pairs if pairs else None
