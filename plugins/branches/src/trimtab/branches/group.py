"""The branches of one request: when it is answered, and which of them are pruned (SART).

No engine here: whoever drives a group tells it what the branches do, and ends those it names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol

from trimtab.branches.note import Fate


class Bars(Protocol):
    """Which branches fall to pruning."""

    @property
    def at_once(self) -> bool:
        """Whether a branch that finishes has all others judged, by their last scores."""

    def condemned(self, judged: Sequence[Branch], group: BranchGroup) -> list[Branch]:
        """Those of the judged ones that are to end, first those that can best be spared."""

    def survivors(self, best_score: float | None) -> int:
        """How many branches pruning leaves at least, with this best score of a finished one."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request asked for.

    Attributes:
        branches: launched (N).
        enough: finished ones that answer the request (M).
        score_every: output tokens between two scorings (T).
        max_pruned: most prunings while none has finished (beta).
        prunes: whether branches are pruned at all.
    """

    branches: int
    enough: int
    score_every: int
    max_pruned: int
    prunes: bool = True

    @property
    def exhaustive(self) -> bool:
        """Whether every branch is to run to its own end."""
        return not self.prunes and self.enough >= self.branches


def length_class(tokens: int) -> int:
    """Lengths within a power of two: scores are only compared with those of about their length."""
    return tokens.bit_length()


@dataclass(slots=True, eq=False)
class Branch:
    """One branch of a group; `fate` is None while it lives."""

    index: int
    tokens: int = 0
    scored: int = 0
    """The multiples of `Rules.score_every` that have been judged."""
    score: float | None = None
    score_at: int = 0
    trail: dict[int, float] = field(default_factory=dict)
    """While it lived, its first score at each length; see `length_class`."""
    fate: Fate | None = None
    phase: int = 1


class BranchGroup:
    """The state of one request.

    Args:
        rules: what the request asked for.
        bars: which branches are pruned.

    Attributes:
        branches: those that have arrived, by index.
        closed: whether the request is answered.
        first: the branch that finished first.
        best: the best score of those that have finished.
    """

    def __init__(self, rules: Rules, bars: Bars) -> None:
        self.rules = rules
        self._bars = bars
        self.branches: dict[int, Branch] = {}
        self.closed = False
        self.first: Branch | None = None
        self.best: float | None = None
        self._pruned = 0
        self._done = 0
        self._live = 0
        self._to_judge: set[int] = set()

    @property
    def phase(self) -> int:
        """1 while no branch has finished, then 2."""
        return 1 if self.first is None else 2

    @property
    def done(self) -> int:
        """Branches that have finished; those cut by their length have not."""
        return self._done

    @property
    def live(self) -> int:
        """Branches that have arrived and not ended."""
        return self._live

    @property
    def pruned(self) -> int:
        """Branches pruned while none had finished."""
        return self._pruned

    @property
    def lost(self) -> int:
        """Branches that have ended without having finished."""
        return len(self.branches) - self._live - self._done

    @property
    def complete(self) -> bool:
        """Whether every branch has arrived and ended."""
        return not self._live and len(self.branches) >= self.rules.branches

    def living(self) -> Iterator[Branch]:
        """The branches that have not ended, by index."""
        return (self.branches[i] for i in sorted(self.branches) if self.branches[i].fate is None)

    def add(self, index: int) -> None:
        """A branch has arrived."""
        self.branches[index] = Branch(index)
        self._live += 1

    def progress(self, index: int, tokens: int) -> bool:
        """A branch has generated so many tokens by now; whether it must be scored.

        It must each time it has passed a multiple of ``score_every``, also where it jumped over it.
        """
        branch = self.branches[index]
        branch.tokens = tokens
        return tokens // self.rules.score_every > branch.scored

    def score(self, index: int, value: float | None, at_tokens: int) -> bool:
        """A branch's score when it had so many tokens; None: nothing is known of it.

        An answer that is older than the last one, or for a branch that has ended, changes nothing.

        Returns:
            Whether it is the branch's first score at about this length, see `length_class`.
        """
        branch = self.branches.get(index)
        if branch is None or branch.fate is not None or at_tokens < branch.score_at:
            return False
        branch.scored = max(branch.scored, at_tokens // self.rules.score_every)
        if value is None or not math.isfinite(value):
            return False
        before = None
        if branch.score is not None:
            before = length_class(branch.score_at)
            branch.trail.setdefault(before, branch.score)
        branch.score, branch.score_at = value, at_tokens
        self._to_judge.add(index)
        return length_class(at_tokens) != before

    def score_late(self, index: int, value: float) -> None:
        """The score of all of a branch's text, which may have ended meanwhile.

        It counts as if it had been there in time; what was decided before stays.
        """
        branch = self.branches[index]
        if branch.fate is None:
            self.score(index, value, branch.tokens)
        elif math.isfinite(value):
            branch.score, branch.score_at = value, branch.tokens
            if branch.fate is Fate.FINISHED:
                self._weigh_best()

    def finish(self, index: int, fate: Fate) -> None:
        """A branch has come to an end that the group did not ask for."""
        branch = self.branches[index]
        if branch.fate is not None:
            return
        if fate is Fate.FINISHED and self.first is None:
            self.first = branch
        self._end(branch, fate)
        if fate is not Fate.FINISHED:
            return
        self._done += 1
        self._weigh_best()

    def decide(self, enough: int | None = None, *, certain: bool = False) -> list[Branch]:
        """The branches to end now; they count as ended from here on.

        Args:
            enough: finished branches that suffice at the present load; the request's own number by
                default.
            certain: whether the finished ones leave no doubt of the answer.
        """
        if self.closed:
            return self._close(Fate.STOPPED)
        needed = self.rules.enough if enough is None else min(enough, self.rules.enough)
        if self._done >= needed or (certain and self._done):
            self.closed = True
            return self._close(Fate.STOPPED)
        return self._prune() if self._to_judge else []

    def weakest(self) -> Branch | None:
        """The live branch with the lowest score that pruning may spare, if there is one."""
        if not self.rules.prunes or not self._can_spare_one():
            return None
        scored = [b for b in self.living() if b.score is not None]
        return min(scored, key=lambda b: (b.score, -b.index), default=None)

    def evict(self, branch: Branch) -> None:
        """Ends a live branch because the engine has no room for it."""
        self._end(branch, Fate.EVICTED)

    def _end(self, branch: Branch, fate: Fate) -> None:
        branch.fate, branch.phase = fate, self.phase
        self._live -= 1
        self._to_judge.discard(branch.index)

    def _close(self, fate: Fate) -> list[Branch]:
        ended = list(self.living())
        for branch in ended:
            self._end(branch, Fate.WITHHELD if not branch.tokens else fate)
        return ended

    def middle(self) -> float:
        """The median of the last scores of the branches that live or have finished."""
        scores = [
            branch.score
            for branch in self.branches.values()
            if branch.score is not None and branch.fate in (None, Fate.FINISHED)
        ]
        return median(scores) if len(scores) > 1 else math.inf

    def _prune(self) -> list[Branch]:
        """Judges the branches that have a new score."""
        judged = [self.branches[i] for i in self._to_judge]
        self._to_judge.clear()
        if not self.rules.prunes:
            return []
        ended = []
        for branch in self._bars.condemned(judged, self):
            if not self._can_spare_one():
                break
            if self.first is None:
                if self._pruned >= self.rules.max_pruned:
                    break
                self._pruned += 1
            self._end(branch, Fate.PRUNED)
            ended.append(branch)
        return ended

    def _can_spare_one(self) -> bool:
        return self._live + self._done > self._bars.survivors(self.best)

    def _weigh_best(self) -> None:
        """A finished branch has a score: the best may be another, and the others be held to it."""
        finished = (b.score for b in self.branches.values() if b.fate is Fate.FINISHED)
        self.best = max((score for score in finished if score is not None), default=None)
        if self._bars.at_once:
            self._to_judge.update(b.index for b in self.living() if b.score is not None)
