"""Recorded branches: how long each was, whether it ended by itself, whether it was right.

Branches that were pruned or stopped are longer than their record says; leaving them out would make
branches look short, so the estimate is Kaplan's and Meier's for right-censored lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike
from pydantic import ConfigDict

from trimtab.branches.order_statistics import Floats, LengthDistribution, within_group_auroc
from trimtab.core.documents import InvalidValue, parse_json, read_lines, validate
from trimtab.core.errors import BadInput

_MOST_TOKENS = 2**31
_FEWEST_ENDINGS = 2


@dataclass(frozen=True, slots=True)
class RecordedBranch:
    """One line of a file of lengths.

    Attributes:
        question: the id of the request; its branches are compared with one another.
        tokens: how many output tokens the branch had when it ended.
        finished: whether it ended by itself; False for one that was pruned, stopped or cut.
        correct: whether its answer was right; None where nobody knows.
        score: its last reward, from 0 to 1; None where it has none.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    question: str
    tokens: int
    finished: bool
    correct: bool | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.tokens <= _MOST_TOKENS:
            raise InvalidValue(
                f"tokens is {self.tokens}",
                at=("tokens",),
                fix=f"give a number from 1 to {_MOST_TOKENS}",
            )
        if self.score is not None and not 0 <= self.score <= 1:
            raise InvalidValue(
                f"score is {self.score}", at=("score",), fix="give a number from 0 to 1"
            )


@dataclass(frozen=True)
class LengthTrace:
    """Recorded branches by question.

    Attributes:
        questions: the branches of each question, in the file's order.
        name: what people call the trace.
    """

    questions: tuple[tuple[RecordedBranch, ...], ...]
    name: str = "lengths"

    @classmethod
    def of(cls, branches: Sequence[RecordedBranch], name: str = "lengths") -> LengthTrace:
        """The trace of some branches.

        Raises:
            BadInput: fewer than two of them ended by themselves.
        """
        if sum(branch.finished for branch in branches) < _FEWEST_ENDINGS:
            raise BadInput(
                "fewer than two branches ended by themselves",
                where=name,
                fix="record branches that nobody ends, so that their lengths are known",
            )
        groups: dict[str, list[RecordedBranch]] = {}
        for branch in branches:
            groups.setdefault(branch.question, []).append(branch)
        return cls(tuple(tuple(group) for group in groups.values()), name)

    @cached_property
    def branches(self) -> tuple[RecordedBranch, ...]:
        """All branches."""
        return tuple(branch for group in self.questions for branch in group)

    @cached_property
    def censored_share(self) -> float:
        """The share of branches that did not end by themselves."""
        return sum(not branch.finished for branch in self.branches) / len(self.branches)

    @cached_property
    def scales(self) -> tuple[float, ...]:
        """Each question's typical length in tokens: its total time on test for each ending.

        A question without an ending has the scale of the whole trace, or its own tokens where they
        are more.
        """
        pooled = _time_on_test(self.branches)
        return tuple(
            _time_on_test(group)
            if any(branch.finished for branch in group)
            else max(pooled, max(float(branch.tokens) for branch in group))
            for group in self.questions
        )

    @cached_property
    def within_question(self) -> LengthDistribution:
        """Lengths as multiples of their question's scale, over all questions; the mean is 1.

        Dividing by a scale that was estimated from the same few branches hides a part of the
        spread, ``1 / branches`` of its variance, which is put back.
        """
        ratios, finished = [], []
        for scale, group in zip(self.scales, self.questions, strict=True):
            stretch = (len(group) / (len(group) - 1)) ** 0.5 if len(group) > 1 else 1.0
            ratios += [(branch.tokens / scale) ** stretch for branch in group]
            finished += [branch.finished for branch in group]
        lengths = kaplan_meier(ratios, finished)
        return lengths.scaled(1 / lengths.mean)

    @cached_property
    def accuracies(self) -> tuple[float | None, ...]:
        """Each question's share of right branches among those that were judged; None for none."""
        shares: list[float | None] = []
        for group in self.questions:
            known = [branch.correct for branch in group if branch.correct is not None]
            shares.append(sum(known) / len(known) if known else None)
        return tuple(shares)

    @cached_property
    def auroc(self) -> float | None:
        """How often a right branch outscores a wrong one of its question; None if unknown."""
        return within_group_auroc([_judged(group) for group in self.questions])


def _judged(branches: Sequence[RecordedBranch]) -> tuple[list[float], list[bool]]:
    """The scores of branches of which both are known, and whether they were right."""
    known = [
        (b.score, b.correct) for b in branches if b.score is not None and b.correct is not None
    ]
    return [score for score, _ in known], [correct for _, correct in known]


def _time_on_test(branches: Sequence[RecordedBranch]) -> float:
    tokens = sum(branch.tokens for branch in branches)
    return tokens / sum(branch.finished for branch in branches)


def kaplan_meier(tokens: ArrayLike, finished: ArrayLike) -> LengthDistribution:
    """The distribution of lengths of which some are only known to be longer than recorded.

    What is left after the last ending is put on the longest length (Efron's convention).

    Args:
        tokens: the recorded lengths; shape (branches,).
        finished: whether each branch ended by itself there; shape (branches,).

    Raises:
        BadInput: no branch ended by itself, or a length is no positive number.
    """
    lengths, ended = np.asarray(tokens, dtype=float), np.asarray(finished, dtype=bool)
    if not ended.any():
        raise BadInput("no branch ended by itself", fix="record some that nobody ends")
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise BadInput("a length is no positive number", fix="give at least one token each")
    points: Floats = np.unique(lengths[ended]).astype(np.float64)
    ascending = np.sort(lengths)
    at_risk = len(lengths) - np.searchsorted(ascending, points, side="left")
    endings = np.diff(np.searchsorted(np.sort(lengths[ended]), points, side="right"), prepend=0)
    cumulative: Floats = 1.0 - np.cumprod(1.0 - endings / at_risk).astype(np.float64)
    if ascending[-1] > points[-1]:
        points, cumulative = np.append(points, ascending[-1]), np.append(cumulative, 1.0)
    cumulative[-1] = 1.0
    return LengthDistribution(points, cumulative)


def read_lengths(path: str | Path) -> LengthTrace:
    """Reads a file of lengths: one `RecordedBranch` a line, as JSON.

    Raises:
        BadInput: it names the file, the line, the key and what would be right.
    """
    branches = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        branches.append(validate(RecordedBranch, parse_json(line, where=where), where=where))
    if not branches:
        raise BadInput("the file is empty", where=str(path), fix="give one branch a line")
    try:
        return LengthTrace.of(branches, Path(path).stem)
    except BadInput as error:
        raise BadInput(error.what, where=str(path), fix=error.fix) from None
