"""Branches that have ended become one answer: who wins, and what the client is told of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.branches.answers import Candidate, Choice, choose, eligible
from trimtab.branches.asked import Asked
from trimtab.branches.note import Fate, Note

BLOCK = "trimtab"
"""The key of what a response says beyond OpenAI's fields."""

_FATES = {"length": "length", "repetition": "repeated", None: "stopped", "abort": "stopped"}
"""The fates of branches without a note, by their finish reason; of all others it is finished."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A branch as the server's response has it.

    Attributes:
        choice: the choice, whose ``message``, ``delta`` or ``text`` holds all of its text.
        tokens: how many it generated; None if the response does not say.
        score: of all of its text, where it was asked for after the branch's end.
        ids: the prompt's tokens and its own, where the response has them.
    """

    choice: dict[str, Any]
    tokens: int | None = None
    score: float | None = None
    ids: tuple[Sequence[int], Sequence[int]] | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What becomes of one prompt's branches.

    Attributes:
        shown: the branches that the client gets, the winner first.
        told: what the client is told of each of these.
        stops: the stop reasons that the engine itself gave.
        fates: how many ended in which way.
        tokens: the winner's own.
    """

    shown: tuple[int, ...]
    told: dict[int, dict[str, Any]]
    stops: dict[int, int | str | None]
    fates: dict[str, int]
    tokens: int


def settle(ended: Sequence[Ended], asked: Asked, all_tokens: int | None = None) -> Settled:
    """Chooses among the branches of one prompt.

    Args:
        ended: all of them, by number.
        asked: what the request asks.
        all_tokens: those of all branches together, where known: the rest of it is that of the
            branches whose own are not.
    """
    notes = notes_of(ended)
    candidates = _with_answers(_candidates(ended, notes, all_tokens), ended, asked)
    choice = choose(candidates, asked.answer)
    winner = choice.winner.branch
    others = [one.branch for one in candidates if one.branch != winner]
    shown = (winner, *(others if asked.show_all else ()))
    told = {i: _told(candidates[i], notes[i]) for i in shown}
    told[winner] |= _votes(choice)
    return Settled(
        shown=shown,
        told=told,
        stops={
            i: note.stop if note else ended[i].choice.get("stop_reason")
            for i, note in notes.items()
        },
        fates=dict(Counter(one.fate for one in candidates)),
        tokens=choice.winner.tokens,
    )


def notes_of(ended: Sequence[Ended]) -> dict[int, Note | None]:
    """What the engine told of each branch."""
    return {i: Note.read(one.choice.get("stop_reason")) for i, one in enumerate(ended)}


def summary(settled: Sequence[Settled], asked: Asked) -> dict[str, Any]:
    """What a response says of all its branches."""
    fates: Counter[str] = Counter()
    for one in settled:
        fates.update(one.fates)
    return {
        "branches": asked.branches,
        "enough": asked.enough,
        "answer": asked.answer,
        "extract": asked.rule,
        "fates": dict(fates),
        "answer_tokens": sum(one.tokens for one in settled),
    }


def fate(finish_reason: str | None, note: Note | None, tokens: int | None = None) -> str:
    """How a branch ended; one that ended without a word may never have started."""
    if note is not None:
        return note.fate.value
    if finish_reason is None and not tokens:
        return "withheld"
    return _FATES.get(finish_reason, "finished")


def last_scores(notes: Mapping[int, Note | None]) -> dict[int, float]:
    """The newest score of each branch that its own note or a sibling's tells.

    Notes of siblings that ended later know more branches.
    """
    scores: dict[int, float] = {}
    for told in sorted(filter(None, notes.values()), key=lambda note: len(note.others)):
        scores.update(told.others)
    for i, note in notes.items():
        if note is not None and note.score is not None and _told_later(i, notes) is None:
            scores[i] = note.score
    return scores | {i: s for i in notes if (s := _told_later(i, notes)) is not None}


def awaited(notes: Mapping[int, Note | None]) -> dict[int, tuple[float, float]]:
    """What is known of each finished branch of which no note has the whole score.

    The weighted sum of its signals, and the sum of their weights.
    """
    return {
        i: note.awaited
        for i, note in notes.items()
        if note is not None
        and note.awaited is not None
        and note.fate is Fate.FINISHED
        and _told_later(i, notes) is None
    }


def _told_later(i: int, notes: Mapping[int, Note | None]) -> float | None:
    """The score that came after a branch's own note was written."""
    own = notes[i]
    if own is None or own.awaited is None:
        return None
    said = (note.others.get(i) for note in notes.values() if note is not None)
    return next((score for score in said if score not in (None, own.score)), None)


def text(choice: dict[str, Any]) -> str:
    """What a choice says, without its reasoning; the tools it calls where it says nothing."""
    message = choice.get("message") or choice.get("delta")
    if message is None:
        return choice.get("text") or ""
    calls = [call.get("function") or {} for call in message.get("tool_calls") or ()]
    called = "\n".join(f"{call.get('name')} {call.get('arguments')}" for call in calls)
    return message.get("content") or called


def _candidates(
    ended: Sequence[Ended], notes: dict[int, Note | None], all_tokens: int | None
) -> list[Candidate]:
    scores = last_scores(notes)
    scores |= {i: one.score for i, one in enumerate(ended) if one.score is not None}
    known = {
        i: n.tokens if n else one.tokens for (i, n), one in zip(notes.items(), ended, strict=True)
    }
    unknown = [i for i, tokens in known.items() if tokens is None]
    if unknown:
        rest = (all_tokens or 0) - sum(tokens or 0 for tokens in known.values())
        known |= dict.fromkeys(unknown, max(0, rest) // len(unknown))
    return [
        Candidate(
            branch=i,
            fate=fate(one.choice.get("finish_reason"), notes[i], one.tokens),
            score=scores.get(i),
            tokens=known[i] or 0,
        )
        for i, one in enumerate(ended)
    ]


def _with_answers(
    candidates: list[Candidate], ended: Sequence[Ended], asked: Asked
) -> list[Candidate]:
    """The candidates with their answers, where one is voted on or shown."""
    if asked.rule == "none" and asked.answer in ("best", "shortest"):
        return candidates
    wanted = candidates if asked.show_all else eligible(candidates)
    answers = {one.branch: asked.extract(text(ended[one.branch].choice)) for one in wanted}
    return [replace(one, answer=answers.get(one.branch)) for one in candidates]


def _told(one: Candidate, note: Note | None) -> dict[str, Any]:
    told = {
        "branch": one.branch,
        "fate": one.fate,
        "phase": note.phase if note else None,
        "score": one.score,
        "tokens": one.tokens,
    }
    return told if one.answer is None else {**told, "answer": one.answer}


def _votes(choice: Choice) -> dict[str, int]:
    return {"votes": choice.votes, "voters": choice.voters} if choice.votes else {}
