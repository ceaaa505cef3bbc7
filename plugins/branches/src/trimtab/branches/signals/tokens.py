"""Signals from the logprobs of the tokens themselves, averaged over a window: no second model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call

TOP_LOGPROBS = 20
"""As DeepConf (arXiv:2508.15260) has it; vLLM's ``--max-logprobs`` allows as many by default."""

_CONFIDENCE_SCALE = 10.0
_FIRST_SLOTS = 64
_MOST = 16
"""Windows that are kept at most."""

Values = NDArray[np.floating]


def sampled(logprobs: NDArray[np.float32]) -> Values:
    """The sampled tokens' logprobs."""
    values: Values = logprobs[:, 0]
    return values


def confidence(logprobs: NDArray[np.float32]) -> Values:
    """Minus the mean of the largest logprobs: the more peaked a distribution, the larger."""
    if logprobs.shape[1] > 1 + TOP_LOGPROBS:
        logprobs = logprobs[:, : 1 + TOP_LOGPROBS]
    values: Values = logprobs @ _minus_mean(logprobs.shape[1])
    return values


@cache
def _minus_mean(columns: int) -> NDArray[np.float32]:
    """What makes that mean of whole rows: a product with a part of each would copy it first."""
    weights = np.full(columns, -1.0 / (columns - 1), dtype=np.float32)
    weights[0] = 0.0
    return weights


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


@dataclass(frozen=True, slots=True)
class Reading:
    """What is made of a token's logprobs.

    Attributes:
        value: of each row of logprobs.
        scaled: makes a score in [0, 1] of a mean.
        top_logprobs: how many of the largest logprobs ``value`` reads.
    """

    value: Callable[[NDArray[np.float32]], Values]
    scaled: Callable[[float], float]
    top_logprobs: int


PROBABILITY = Reading(sampled, probability_of, 0)
CONFIDENCE = Reading(confidence, share_of, TOP_LOGPROBS)
ENTROPY = Reading(certainty, clipped, TOP_LOGPROBS)


class TokenSignal(BranchScorer):
    """The mean of a value of each token, over a window of a branch's tokens.

    Args:
        reading: the value.
        window: tokens that a mean is over.
    """

    def __init__(self, reading: Reading, window: int) -> None:
        self.top_logprobs = reading.top_logprobs
        self._value, self._scaled = reading.value, reading.scaled
        self._window = window

    def score(self, slot: int, call: Call) -> float | None:
        """The score of the window; a text shorter than one is a window of its own."""
        mean = self._mean(slot, call)
        if mean is None:
            return None
        score = self._scaled(mean)
        return score if math.isfinite(score) else None

    def _mean(self, slot: int, call: Call) -> float | None:
        raise NotImplementedError


class LastWindow(TokenSignal):
    """The mean over a branch's last tokens.

    The values of one `observe` lie side by side, so that taking them in touches little memory. They
    are kept for two windows, and for up to sixteen where branches take turns (several tokens a step
    for some, preemption); a branch that stood still for longer begins anew.
    """

    def __init__(self, reading: Reading, window: int) -> None:
        super().__init__(reading, window)
        self._values = np.full((2 * window, _FIRST_SLOTS), np.nan, dtype=np.float32)
        self._place = 0

    def start(self, slot: int, call: Call) -> None:
        """Clears a slot."""
        missing = slot + 1 - self._values.shape[1]
        if missing > 0:
            more = max(missing, self._values.shape[1])
            self._values = np.pad(self._values, ((0, 0), (0, more)), constant_values=np.nan)
        self._values[:, slot] = np.nan

    def observe(self, slots: NDArray[np.intp], logprobs: NDArray[np.float32]) -> None:
        """Moves on by one token of each branch."""
        row = self._values[self._place]
        row.fill(np.nan)
        row[slots] = self._value(logprobs)
        self._place = (self._place + 1) % len(self._values)

    def _mean(self, slot: int, call: Call) -> float | None:
        values = np.roll(self._values[:, slot], -self._place)
        # Where a grammar leaves few tokens, logprobs say nothing of what the model thinks.
        known = values[np.isfinite(values)]
        wanted = min(self._window, call.output_tokens)
        if len(known) < wanted and len(values) < _MOST * self._window:
            self._keep_more()
        return float(known[-self._window :].mean(dtype=np.float64)) if len(known) else None

    def _keep_more(self) -> None:
        kept = np.roll(self._values, -self._place, axis=0)
        self._place = len(kept)
        self._values = np.concatenate([kept, np.full_like(kept, np.nan)])


class LowestWindow(TokenSignal):
    """The mean over the worst window so far."""

    def __init__(self, reading: Reading, window: int) -> None:
        super().__init__(reading, window)
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
        if not math.isfinite(values.sum()):
            # Where a grammar leaves few tokens, logprobs say nothing of what the model thinks.
            known = np.isfinite(values)
            slots, values = slots[known], values[known]
        seen = self._seen[slots]
        places = seen % self._window
        total = self._total[slots] + values - self._recent[slots, places]
        self._total[slots] = total
        full = np.where(seen + 1 >= self._window, total / self._window, np.inf)
        self._lowest[slots] = np.minimum(self._lowest[slots], full)
        self._recent[slots, places] = values
        self._seen[slots] = seen + 1

    def _mean(self, slot: int, call: Call) -> float | None:
        seen = int(self._seen[slot])
        if seen >= self._window:
            return float(self._lowest[slot])
        return float(self._recent[slot, :seen].mean()) if seen else None

    def _grow(self, slot: int) -> None:
        more = max(slot + 1, 2 * len(self._seen)) - len(self._seen)
        self._recent = np.concatenate([self._recent, np.zeros((more, self._window))])
        self._total = np.concatenate([self._total, np.zeros(more)])
        self._seen = np.concatenate([self._seen, np.zeros(more, dtype=np.intp)])
        self._lowest = np.concatenate([self._lowest, np.full(more, np.inf)])
