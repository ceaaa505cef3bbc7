"""Signals from the logprobs of the tokens themselves, averaged over a window: no second model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call

TOP_LOGPROBS = 20
"""As DeepConf (arXiv:2508.15260) has it; vLLM's ``--max-logprobs`` allows as many by default."""

_CONFIDENCE_SCALE = 10.0
_FIRST_SLOTS = 64

Values = NDArray[np.float64]
Which = Literal["last", "lowest"]


def sampled(logprobs: NDArray[np.float32]) -> Values:
    """The sampled tokens' logprobs."""
    values: Values = logprobs[:, 0].astype(np.float64)
    return values


_MINUS_MEAN = np.full(TOP_LOGPROBS, -1.0 / TOP_LOGPROBS, dtype=np.float32)


def confidence(logprobs: NDArray[np.float32]) -> Values:
    """Minus the mean of the largest logprobs: the more peaked a distribution, the larger."""
    values: Values = (logprobs[:, 1 : 1 + TOP_LOGPROBS] @ _MINUS_MEAN).astype(np.float64)
    return values


def certainty(logprobs: NDArray[np.float32]) -> Values:
    """1 minus the entropy of the largest logprobs, as a share of what it can be at most."""
    top = logprobs[:, 1 : 1 + TOP_LOGPROBS].astype(np.float64)
    shares = np.exp(top)
    shares /= shares.sum(axis=1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(axis=1)
    values: Values = 1.0 - entropy / np.log(top.shape[1])
    values[~np.isfinite(top).all(axis=1)] = np.nan
    return values


def probability_of(mean: float) -> float:
    """The geometric mean of probabilities, from their mean logprob."""
    return float(np.exp(min(mean, 0.0)))


def share_of(mean: float) -> float:
    """A confidence, from nothing to infinity, as a share of 1."""
    return float(-np.expm1(-max(mean, 0.0) / _CONFIDENCE_SCALE))


def clipped(mean: float) -> float:
    """A mean that is a score already, but for what rounding did."""
    return min(max(mean, 0.0), 1.0)


class TokenSignal(BranchScorer):
    """The mean of a value of each token, over a branch's last tokens or over its worst window.

    Args:
        value: of each row of logprobs.
        scaled: makes a score in [0, 1] of a mean.
        top_logprobs: how many of the largest logprobs ``value`` reads.
        window: tokens that a mean is over.
        which: the last window, or the lowest so far.
    """

    def __init__(
        self,
        value: Callable[[NDArray[np.float32]], Values],
        scaled: Callable[[float], float],
        *,
        top_logprobs: int,
        window: int,
        which: Which = "last",
    ) -> None:
        self.top_logprobs = top_logprobs
        self._value = value
        self._scaled = scaled
        self._window = window
        self._lowest_counts = which == "lowest"
        self._recent = np.zeros((_FIRST_SLOTS, window))
        self._total = np.zeros(_FIRST_SLOTS)
        self._seen = np.zeros(_FIRST_SLOTS, dtype=np.intp)
        self._lowest = np.full(_FIRST_SLOTS, np.inf)

    def start(self, slot: int, call: Call) -> None:
        """Clears a slot."""
        if slot >= len(self._seen):
            self._grow(slot)
        self._recent[slot] = 0.0
        self._total[slot] = 0.0
        self._seen[slot] = 0
        self._lowest[slot] = np.inf

    def observe(self, slots: NDArray[np.intp], logprobs: NDArray[np.float32]) -> None:
        """Moves each branch's window on by one token."""
        values = self._value(logprobs)
        known = np.isfinite(values)
        if not known.all():
            # Where a grammar leaves few tokens, logprobs say nothing of what the model thinks.
            slots, values = slots[known], values[known]
        seen = self._seen[slots]
        places = seen % self._window
        if self._lowest_counts:
            total = self._total[slots] + values - self._recent[slots, places]
            self._total[slots] = total
            full = np.where(seen + 1 >= self._window, total / self._window, np.inf)
            self._lowest[slots] = np.minimum(self._lowest[slots], full)
        self._recent[slots, places] = values
        self._seen[slots] = seen + 1

    def score(self, slot: int, call: Call) -> float | None:
        """The score of the window; a text shorter than one is a window of its own."""
        seen = int(self._seen[slot])
        if not seen:
            return None
        if self._lowest_counts and seen >= self._window:
            mean = float(self._lowest[slot])
        else:
            mean = float(self._recent[slot, :seen].mean())
        score = self._scaled(mean)
        return score if np.isfinite(score) else None

    def _grow(self, slot: int) -> None:
        more = max(slot + 1, 2 * len(self._seen)) - len(self._seen)
        self._recent = np.concatenate([self._recent, np.zeros((more, self._window))])
        self._total = np.concatenate([self._total, np.zeros(more)])
        self._seen = np.concatenate([self._seen, np.zeros(more, dtype=np.intp)])
        self._lowest = np.concatenate([self._lowest, np.full(more, np.inf)])
