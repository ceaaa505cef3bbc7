"""Which branches pruning ends: by the paper's thresholds, or by what they may still give."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from trimtab.branches.group import length_class

if TYPE_CHECKING:
    from trimtab.branches.group import Branch, BranchGroup

_REMEMBERED = 256
_ENOUGH = 16

WORTH_WAITING = 0.18
"""By how much a live branch must be expected to raise the best final score, to go on.

In standard deviations of final scores, for a present score that tells nothing of them; the more it
tells, the more right answers a standard deviation is, and the less of it suffices.
"""

_FEWEST_PAIRS = 24
_FIRST_CORRELATION = 0.6
_WEAKEST, _STRONGEST = 0.2, 0.97
_NORMAL = NormalDist()


class PaperBars:
    """Two fixed thresholds (SART, two-phase pruning).

    Args:
        alpha: the threshold while no branch has finished; then the first one's score (alpha'),
            which never lowers it.
    """

    at_once = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def condemned(self, judged: Sequence[Branch], group: BranchGroup) -> list[Branch]:
        """Those under the threshold, the lowest first."""
        first = group.first.score if group.first is not None else None
        return _under(self._alpha if first is None else max(self._alpha, first), judged)

    def survivors(self, best_score: float | None) -> int:
        """One, whatever has finished."""
        return 1


class FixedBar:
    """One threshold for all, whoever has finished.

    Args:
        alpha: the threshold; minus infinity prunes nothing.
    """

    at_once = False

    def __init__(self, alpha: float) -> None:
        self._alpha = alpha

    def condemned(self, judged: Sequence[Branch], group: BranchGroup) -> list[Branch]:
        """Those under the threshold, the lowest first."""
        return _under(self._alpha, judged)

    def survivors(self, best_score: float | None) -> int:
        """One, whatever has finished."""
        return 1


def _under(bar: float, judged: Sequence[Branch]) -> list[Branch]:
    low = [(b.score, -b.index, b) for b in judged if b.score is not None and b.score < bar]
    return [branch for *_, branch in sorted(low)]


class Recent:
    """The last scores of one kind, in order."""

    def __init__(self) -> None:
        self._by_age: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, score: float) -> None:
        """Takes a score in, and forgets the oldest of too many."""
        self._by_age.append(score)
        insort(self._sorted, score)
        if len(self._sorted) > _REMEMBERED:
            del self._sorted[bisect_left(self._sorted, self._by_age.popleft())]

    def rank(self, score: float) -> float:
        """The share of them that lies at or under a score."""
        return bisect_right(self._sorted, score) / len(self._sorted) if self._sorted else 0.0

    def deviate(self, score: float) -> float | None:
        """A score's rank as a normal deviate, ties in the middle; None with too few of them."""
        if len(self._sorted) < _ENOUGH:
            return None
        under = (bisect_left(self._sorted, score) + bisect_right(self._sorted, score)) / 2
        return _NORMAL.inv_cdf((under + 0.5) / (len(self._sorted) + 1))


class Pairs:
    """Scores in the middle of texts and at their ends: how much the one tells of the other."""

    def __init__(self) -> None:
        self._pairs: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._new = 0
        self._known = _FIRST_CORRELATION

    def add(self, score: float, final: float) -> None:
        """A branch that scored this in the middle has finished with that."""
        self._pairs.append((score, final))
        self._new += 1

    def correlation(self) -> float:
        """That of their ranks as normal deviates; a guess while there are few."""
        if len(self._pairs) >= _FEWEST_PAIRS and self._new >= _FEWEST_PAIRS // 3:
            self._new = 0
            middles, ends = zip(*self._pairs, strict=True)
            self._known = min(max(_correlation(middles, ends), _WEAKEST), _STRONGEST)
        return self._known


def _correlation(some: Sequence[float], others: Sequence[float]) -> float:
    """That of two rows' ranks as normal deviates; 0 where all of a row are equal."""
    deviates = np.stack([ndtri((rankdata(row) - 0.5) / len(row)) for row in (some, others)])
    spreads = deviates.std(axis=1)
    return float(np.corrcoef(deviates)[0, 1]) if spreads.all() else 0.0


class History:
    """The recent scores of all requests' branches, by length, and of those that finished.

    A score of half a text and one of a whole text are on different scales, so each is only ever
    compared with those of about its length.
    """

    def __init__(self) -> None:
        self._by_length: dict[int, Recent] = {}
        self._pairs: defaultdict[int, Pairs] = defaultdict(Pairs)
        self.finished = Recent()

    def at(self, tokens: int) -> Recent:
        """The scores of branches of about so many tokens."""
        return self._by_length.setdefault(length_class(tokens), Recent())

    def finish(self, trail: Mapping[int, float], final: float) -> None:
        """A branch has finished; ``trail`` has its score at each length before."""
        self.finished.add(final)
        for length, score in trail.items():
            self._pairs[length].add(score, final)

    def correlation(self, tokens: int) -> float:
        """How much a score of about so many tokens tells of the final one."""
        return self._pairs[length_class(tokens)].correlation()


class Outlook(NamedTuple):
    """What a branch's final score is expected to be: a normal distribution of its deviate."""

    mean: float
    variance: float


class LikeWithLike:
    """Safe mode: a branch goes on as long as it may still give the answer.

    It is compared with others that were as far as it is. Ranks as normal deviates, its final score
    ``Z`` is distributed as ``N(r z, 1 - r^2)``, where ``z`` is its present one and ``r`` how much
    scores at this length told of final ones lately. It is worth its tokens as long as
    ``E[(Z - B)+]`` is more than a little, where ``B`` is the best of its siblings: of those that
    have finished, or what becomes of the most promising one that lives. A weak signal in the middle
    of texts so prunes little, and a very good branch ends its siblings.

    Args:
        history: the recent scores.
        alpha: while no branch has finished, a fixed threshold in place of that; the upper half of
            the siblings is safe from it, since a hard question's branches score low together.
    """

    at_once = True

    def __init__(self, history: History, alpha: float | None) -> None:
        self._history = history
        self._alpha = alpha
        self._outlooks: dict[int, tuple[float, int, Outlook]] = {}

    def condemned(self, judged: Sequence[Branch], group: BranchGroup) -> list[Branch]:
        """Those of which no answer is expected any more, the most hopeless first."""
        if self._alpha is not None and group.first is None:
            return _under(min(self._alpha, group.middle()), judged)
        known = [(b.index, o) for b in group.living() if (o := self._outlook(b)) is not None]
        rivals = sorted((outlook, index) for index, outlook in known)[-2:]
        best = None if group.best is None else self._history.finished.deviate(group.best)
        outlooks = dict(known)
        hopeless = []
        for branch in judged:
            outlook = outlooks.get(branch.index)
            if outlook is None:
                continue
            gains = [gain(outlook, rival) for rival, index in rivals if index != branch.index][-1:]
            if best is not None:
                gains.append(gain(outlook, Outlook(best, 0.0)))
            if gains and min(gains) < WORTH_WAITING * outlook.variance:
                hopeless.append((min(gains), -branch.index, branch))
        return [branch for *_, branch in sorted(hopeless)]

    def survivors(self, best_score: float | None) -> int:
        """Two, until a branch has finished: it may be the only one left."""
        return 2 if best_score is None else 1

    def _outlook(self, branch: Branch) -> Outlook | None:
        """By its last score; None without one, or with too few to compare it with."""
        score, at_tokens = branch.score, branch.score_at
        if score is None:
            return None
        found = self._outlooks.get(branch.index)
        if found is not None and found[0] == score and found[1] == at_tokens:
            return found[2]
        deviate = self._history.at(at_tokens).deviate(score)
        if deviate is None:
            return None
        told = self._history.correlation(at_tokens)
        outlook = Outlook(told * deviate, 1 - told * told)
        self._outlooks[branch.index] = score, at_tokens, outlook
        return outlook


def gain(of: Outlook, over: Outlook) -> float:
    """``E[(X - Y)+]`` of two independent normal variables."""
    spread = math.sqrt(of.variance + over.variance)
    lead = of.mean - over.mean
    if not spread:
        return max(lead, 0.0)
    ahead = lead / spread
    return spread * _NORMAL.pdf(ahead) + lead * _NORMAL.cdf(ahead)
