"""What the engine tells the server of a branch, in the ``stop_reason`` of its last output."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

_MARK = "trimtab.branches"
_VERSION = 1


class Fate(Enum):
    """How a branch ended."""

    FINISHED = "finished"
    """By itself."""
    LENGTH = "length"
    """Cut by its ``max_tokens``."""
    PRUNED = "pruned"
    """By its scores."""
    STOPPED = "stopped"
    """Enough others had finished, or their vote was certain."""
    EVICTED = "evicted"
    """The KV cache was full."""
    WITHHELD = "withheld"
    """It never started, since other requests waited for its place."""
    REPEATED = "repeated"
    """The engine saw that it repeats itself."""


@dataclass(frozen=True, slots=True)
class Note:
    """The end of a branch.

    Attributes:
        phase: 1 while no branch of the request had finished (exploration), then 2 (exploitation).
        score: the last score, in [0, 1]; None if there was none.
        tokens: the output's length.
        stop: what the engine itself gives as ``stop_reason``.
        others: the last scores of those that had ended before, by their index: one that a stop
            string ended in the server has no note of its own.
        awaited: where the answer of a signal was still on its way: the weighted sum of the signals
            that were known, and the sum of their weights. A later branch's ``others`` may hold the
            whole score; this branch's own ``score`` is then an older one.
    """

    fate: Fate
    phase: int
    score: float | None
    tokens: int
    stop: int | str | None = None
    others: Mapping[int, float] = field(default_factory=dict)
    awaited: tuple[float, float] | None = None

    def to_text(self) -> str:
        """The note as a string of JSON."""
        content: dict[str, Any] = {
            _MARK: _VERSION,
            "fate": self.fate.value,
            "phase": self.phase,
            "score": None if self.score is None else round(self.score, 4),
            "tokens": self.tokens,
            "stop": self.stop,
        }
        if self.others:
            content["others"] = {str(i): round(score, 4) for i, score in self.others.items()}
        if self.awaited is not None:
            content["awaited"] = [round(number, 4) for number in self.awaited]
        return json.dumps(content, separators=(",", ":"))

    @staticmethod
    def read(text: object) -> Note | None:
        """The note that a ``stop_reason`` holds; None for any other stop reason."""
        if not isinstance(text, str) or _MARK not in text:
            return None
        try:
            content = json.loads(text)
            if content[_MARK] != _VERSION:
                return None
            return Note(
                fate=Fate(content["fate"]),
                phase=int(content["phase"]),
                score=_score(content["score"]),
                tokens=int(content["tokens"]),
                stop=content["stop"],
                others={
                    int(i): score
                    for i, value in content.get("others", {}).items()
                    if (score := _score(value)) is not None
                },
                awaited=_awaited(content.get("awaited")),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _score(value: object) -> float | None:
    """A score as it was said, if it is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _awaited(said: object) -> tuple[float, float] | None:
    """A weighted sum and its weights as they were said, if they are that."""
    if not isinstance(said, list) or len(said) != 2:
        return None
    total, weights = map(_score, said)
    return None if total is None or weights is None else (total, weights)
