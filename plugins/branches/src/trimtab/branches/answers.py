"""Which of a request's branches is its answer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from trimtab.branches.extract import normalised

FINISHED = "finished"
CUT = "length"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A branch that has ended.

    Attributes:
        branch: its number among the request's branches.
        fate: why it ended, as notes say it.
        score: its reward, 0 to 1; None if nobody scored it.
        tokens: how many it generated.
        answer: what was extracted of its text; None if nothing was.
    """

    branch: int
    fate: str
    score: float | None = None
    tokens: int = 0
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner, and how many of the branches that counted gave its answer."""

    winner: Candidate
    votes: int
    voters: int


def choose(branches: Sequence[Candidate], how: str) -> Choice:
    """The answer among branches that have ended; the same branches give the same one.

    Only branches that finished by themselves count; where there is none, those cut by their
    length; where there is none of these either, all. An unknown score is the mean of the known
    ones. Ties go to the higher score, then to the fewer tokens, then to the lower number.

    Args:
        branches: at least one.
        how: ``best`` (score), ``majority`` (of the normalised answers), ``weighted`` (the majority
            by sum of scores) or ``shortest``. Branches without an answer do not vote; where none
            has one, the best wins.
    """
    counted = eligible(branches)
    scores = _scores(counted)

    def rank(one: Candidate) -> tuple[float, int, int]:
        return -scores[one.branch], one.tokens, one.branch

    same = _alike(counted)
    if how == "shortest":
        winner = min(counted, key=lambda one: (one.tokens, *rank(one)))
    elif how == "best" or not same:
        winner = min(counted, key=rank)
    else:
        weight = _counts if how == "majority" else _sums
        leading = min(same.values(), key=lambda alike: weight(alike, scores))
        winner = min(leading, key=rank)
    votes = len(same.get(normalised(winner.answer), ())) if winner.answer is not None else 0
    return Choice(winner, votes, len(counted))


def eligible(branches: Sequence[Candidate]) -> list[Candidate]:
    """The branches that may be the answer, by number."""
    for accepted in ({FINISHED}, {CUT}):
        found = [one for one in branches if one.fate in accepted]
        if found:
            return sorted(found, key=_number)
    return sorted(branches, key=_number)


def _number(one: Candidate) -> int:
    return one.branch


def _scores(counted: Sequence[Candidate]) -> dict[int, float]:
    known = [one.score for one in counted if one.score is not None]
    # Where nobody is scored all are alike, and a weighted vote is a plain one.
    mean = fmean(known) if known else 1.0
    return {one.branch: mean if one.score is None else one.score for one in counted}


def _alike(counted: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """The branches by their normalised answers."""
    same: defaultdict[str, list[Candidate]] = defaultdict(list)
    for one in counted:
        if one.answer is not None:
            same[normalised(one.answer)].append(one)
    return dict(same)


Rank = tuple[float, ...]
_Weight = Callable[[Sequence[Candidate], dict[int, float]], Rank]


def _counts(alike: Sequence[Candidate], scores: dict[int, float]) -> Rank:
    return -len(alike), *_sums(alike, scores)


def _sums(alike: Sequence[Candidate], scores: dict[int, float]) -> Rank:
    total = sum(scores[one.branch] for one in alike)
    best = max(scores[one.branch] for one in alike)
    # Rounded: the order of a sum must not decide.
    return -round(total, 9), -best, *min((one.tokens, one.branch) for one in alike)
