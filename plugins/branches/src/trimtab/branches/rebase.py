"""REBASE's tree search as the simulator sees it (arXiv:2408.00724, reward balanced search)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trimtab.branches.drawn import Question

TEMPERATURE = 0.2


def searched(question: Question, score_every: int, seed: int) -> Question:
    """The question as its tree's leaves answer it.

    At each scoring the live branches' places are shared out by the softmax of their rewards: a good
    branch is continued in several places, a bad one in none. A place keeps its length, so the
    engine's load is that of as many branches waited for (of forks sharing KV nothing is assumed).
    A continuation keeps its parent's outcome with the probability of the parent's progress; else it
    turns out as the place's own draw did.
    """
    rng = np.random.default_rng((seed, round(question.arrival_s * 1e6)))
    content = list(range(len(question.lengths)))
    for scoring in range(1, (max(question.lengths) - 1) // score_every + 1):
        tokens = scoring * score_every
        live = [place for place, length in enumerate(question.lengths) if length > tokens]
        rewards = [_reward(question, content[place], scoring) for place in live]
        parents = _shared_out(rewards)
        told = [content[live[parent]] for parent in parents]
        for own, (place, source) in enumerate(zip(live, told, strict=True)):
            if parents[own] == own:
                continue
            progress = min(1.0, tokens / question.lengths[source])
            content[place] = source if rng.random() < progress else place
    return replace(
        question,
        answers=tuple(question.answers[source] for source in content),
        rewards=tuple(
            _stretched(question.rewards[source], len(question.rewards[place]))
            for place, source in enumerate(content)
        ),
    )


def _reward(question: Question, branch: int, scoring: int) -> float:
    rewards = question.rewards[branch]
    return rewards[min(scoring, len(rewards)) - 1]


def _shared_out(rewards: Sequence[float]) -> list[int]:
    """Which of the live branches each live place continues; those continued keep their own."""
    weights = [math.exp(reward / TEMPERATURE) for reward in rewards]
    total, left = sum(weights), len(rewards)
    children = [0] * len(rewards)
    for index in sorted(range(len(rewards)), key=lambda i: -rewards[i]):
        children[index] = min(left, math.ceil(left * weights[index] / total)) if left else 0
        left -= children[index]
        total -= weights[index]
    parents = [index if count else -1 for index, count in enumerate(children)]
    spare = [index for index, count in enumerate(children) for _ in range(count - 1)]
    return [spare.pop() if parent < 0 else parent for parent in parents]


def _stretched(rewards: Sequence[float], count: int) -> tuple[float, ...]:
    """So many rewards that end with the same one."""
    kept = tuple(rewards[: count - 1])
    return kept + (rewards[-1],) * (count - len(kept))
