"""Scores that a request brings along, for experiments in which the rewards are given."""

from __future__ import annotations

import json
import math

from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call, Outcome


class Replay(BranchScorer):
    """The field ``trimtab.replay``: for each branch a list of scores, one for each scoring.

    The last of a list counts for all that follow.
    """

    def __init__(self) -> None:
        self._scores: dict[Call, list[float]] = {}
        self._asked: dict[Call, int] = {}

    def start(self, slot: int, call: Call) -> None:
        """Reads a branch's list; one that is none leaves the branch without scores."""
        try:
            scores = json.loads(str(call.fields.get("replay", "")))[call.branch]
            self._scores[call] = [float(score) for score in scores]
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
            self._scores[call] = []
        self._asked[call] = 0

    def ask(self, slot: int, call: Call) -> None:
        """Moves on to the next score of the list."""
        self._asked[call] += 1

    def score(self, slot: int, call: Call) -> float | None:
        """The score of the list that is due."""
        scores, asked = self._scores[call], self._asked[call]
        if not scores or not asked:
            return None
        score = scores[min(asked, len(scores)) - 1]
        return score if math.isfinite(score) else None

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        """Forgets a branch."""
        self._scores.pop(call, None)
        self._asked.pop(call, None)
