"""Branches that have ended become one answer: who wins, and what the client is told of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from trimtab.branches.answers import Candidate, Choice, choose, eligible
from trimtab.branches.asked import Asked
from trimtab.branches.note import Note

BLOCK = "trimtab"
"""The key of what a response says beyond OpenAI's fields."""

_FATES = {"length": "length", "repetition": "repeated", None: "withheld", "abort": "stopped"}
"""The fates of branches without a note, by their finish reason; of all others it is finished."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A branch as the server's response has it.

    Attributes:
        choice: the choice, whose ``message``, ``delta`` or ``text`` holds all of its text.
        tokens: how many it generated; None if the response does not say.
    """

    choice: dict[str, Any]
    tokens: int | None = None


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
    notes = {i: Note.read(one.choice.get("stop_reason")) for i, one in enumerate(ended)}
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


def fate(finish_reason: str | None, note: Note | None) -> str:
    """How a branch ended."""
    return note.fate.value if note else _FATES.get(finish_reason, "finished")


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
    scores: dict[int, float] = {}
    for note in filter(None, notes.values()):
        scores.update(note.others)
    scores |= {i: n.score for i, n in notes.items() if n is not None and n.score is not None}
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
            fate=fate(one.choice.get("finish_reason"), notes[i]),
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
