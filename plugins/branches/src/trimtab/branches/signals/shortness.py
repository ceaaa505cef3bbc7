"""Short is right: of two branches, the longer one is the more doubtful (SART, section 2)."""

from __future__ import annotations

from trimtab.branches.bars import Recent
from trimtab.core.branch_scoring import BranchScorer
from trimtab.core.policy import Call, Outcome


class Shortness(BranchScorer):
    """The share of the branches finished lately that were longer than this one is by now."""

    def __init__(self) -> None:
        self._lengths = Recent()

    def score(self, slot: int, call: Call) -> float | None:
        """From 1 for a branch shorter than all to 0."""
        if not len(self._lengths):
            return None
        return 1.0 - self._lengths.rank(float(call.output_tokens))

    def finish(self, slot: int, call: Call, outcome: Outcome) -> None:
        """Remembers the length of a branch that came to its own end."""
        if outcome is Outcome.COMPLETED:
            self._lengths.add(float(call.output_tokens))
