"""Questions whose branches' lengths, answers and rewards are drawn, for benchmarks without a model.

All policies meet the same draws, so that they differ by what they do alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from trimtab.branches.order_statistics import Floats, separation

RIGHT = 0
_WRONG_SHARES = (0.4, 0.3, 0.2, 0.1)
_EARLY = 0.4
"""Of a signal's lead over a coin at the end of a text, what it has at its beginning."""
_LASTING = 0.6
"""The share of a signal's noise that stays the same all along a branch."""
_TINY = 1e-12


@dataclass(frozen=True, slots=True)
class Question:
    """A request.

    Attributes:
        arrival_s: when it is asked.
        prompt_tokens: its length.
        lengths: of each branch, if nobody ends it.
        answers: of each branch, as a number; `RIGHT` is the right one.
        rewards: of each branch, its score at each scoring, the last one when it finishes.
        chances: of each branch, how likely it is right in the light of all its rewards and of the
            question's share of right branches; empty where it is not known.
    """

    arrival_s: float
    prompt_tokens: int
    lengths: tuple[int, ...]
    answers: tuple[int, ...]
    rewards: tuple[tuple[float, ...], ...]
    chances: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Kind:
    """What questions are like.

    Attributes:
        branches: how many branches are drawn for each.
        mean_tokens: the mean length of a branch.
        between, within: standard deviations of the logarithms of lengths, of the questions' means
            and of one question's branches.
        prompt_tokens: the length of a prompt.
        accuracy: the share of branches that are right.
        auroc: how well the final reward tells one question's right branches from its wrong ones.
        score_every: output tokens between two scorings.
    """

    branches: int = 8
    mean_tokens: float = 4600.0
    between: float = 0.5
    within: float = 0.5
    prompt_tokens: int = 200
    accuracy: float = 0.55
    auroc: float = 0.84
    score_every: int = 400

    def draw(self, count: int, rate_per_s: float, seed: int) -> list[Question]:
        """So many questions, arriving at random at a mean rate."""
        rng = np.random.default_rng(seed)
        arrivals = np.cumsum(rng.exponential(1.0 / rate_per_s, count))
        return [self._question(float(arrival_s), rng) for arrival_s in arrivals]

    def _question(self, arrival_s: float, rng: np.random.Generator) -> Question:
        centre = math.log(self.mean_tokens) - (self.between**2 + self.within**2) / 2
        own = centre + self.between * rng.standard_normal()
        lengths = np.exp(own + self.within * rng.standard_normal(self.branches))
        tokens = tuple(max(2, round(float(length))) for length in lengths)
        chance = rng.beta(3 * self.accuracy, 3 * (1 - self.accuracy))
        right = rng.random(self.branches) < chance
        wrong = 1 + rng.choice(len(_WRONG_SHARES), self.branches, p=_WRONG_SHARES)
        answers = tuple(int(a) for a in np.where(right, RIGHT, wrong))
        signals = [
            self._signal(length, bool(good), rng)
            for length, good in zip(tokens, right, strict=True)
        ]
        rewards = tuple(self._calibrated(*signal) for signal in signals)
        chances = tuple(_posterior(float(chance), *signal) for signal in signals)
        return Question(arrival_s, self.prompt_tokens, tokens, answers, rewards, chances)

    def rewards(self, length: int, right: bool, rng: np.random.Generator) -> tuple[float, ...]:
        """A calibrated reward: the chance that the branch is right, as far as the signal tells."""
        return self._calibrated(*self._signal(length, right, rng))

    def _signal(self, length: int, right: bool, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """At each scoring, by how much right branches lie above wrong ones, and where this lies."""
        scorings = (length - 1) // self.score_every + 1
        progress = np.minimum((np.arange(scorings) + 1) * self.score_every / length, 1.0)
        aurocs = 0.5 + (self.auroc - 0.5) * (_EARLY + (1 - _EARLY) * progress)
        apart = np.array([separation(float(auroc)) for auroc in aurocs])
        noise = math.sqrt(_LASTING) * rng.standard_normal() + math.sqrt(
            1 - _LASTING
        ) * rng.standard_normal(scorings)
        return apart, apart * right + noise

    def _calibrated(self, apart: Floats, seen: Floats) -> tuple[float, ...]:
        odds = math.log(self.accuracy / (1 - self.accuracy))
        return tuple(expit(odds + apart * seen - apart**2 / 2).round(4).tolist())


def _posterior(chance: float, apart: Floats, seen: Floats) -> float:
    """How likely a branch is right whose signal was seen, by Bayes' rule.

    Its noise has the variance 1, and of any two scorings the covariance `_LASTING`.
    """
    lasting = _LASTING / (1 - _LASTING + _LASTING * len(apart))
    weights = (apart - lasting * apart.sum()) / (1 - _LASTING)
    odds = math.log(max(chance, _TINY) / max(1 - chance, _TINY))
    return float(expit(odds + weights @ (seen - apart / 2)))


def wilson(right: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The interval in which a share lies with 95 % confidence (Wilson's score interval)."""
    if not of:
        return 0.0, 1.0
    share, spread = right / of, z**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / of + z**2 / (4 * of**2)) / (1 + spread)
    return middle - half, middle + half


def accuracy(answers: Sequence[int]) -> float:
    """The share of right answers."""
    return sum(answer == RIGHT for answer in answers) / len(answers)
