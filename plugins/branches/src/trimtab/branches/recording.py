"""Lines of a file of lengths from the server's responses, for ``trimtab plan branches``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from trimtab.branches.lengths import RecordedBranch
from trimtab.branches.note import Fate
from trimtab.branches.settling import BLOCK, text
from trimtab.core.errors import BadInput


def recorded(
    question: str,
    response: Mapping[str, Any],
    is_right: Callable[[str], bool] | None = None,
) -> list[RecordedBranch]:
    """The branches of a response that shows all of them, without those that never started.

    Args:
        question: what the branches are compared within, such as the request's id.
        response: the body of a chat or text completion that was asked for with
            ``trimtab.show`` = ``all``; of the openai client's object the ``model_dump()``.
        is_right: judges the text of a branch that finished; without it nothing is said of that.

    Raises:
        BadInput: the response does not say how its branches ended.
    """
    branches = []
    for choice in response.get("choices") or ():
        told = choice.get(BLOCK)
        if not isinstance(told, Mapping) or "fate" not in told:
            raise BadInput(
                "the response does not say how its branches ended",
                where=f"question {question!r}",
                fix='ask with {"vllm_xargs": {"trimtab.show": "all"}}',
            )
        if told["tokens"]:
            branches.append(_branch(question, choice, told, is_right))
    return branches


def _branch(
    question: str,
    choice: dict[str, Any],
    told: Mapping[str, Any],
    is_right: Callable[[str], bool] | None,
) -> RecordedBranch:
    finished = told["fate"] == Fate.FINISHED.value
    return RecordedBranch(
        question=question,
        tokens=told["tokens"],
        finished=finished,
        correct=bool(is_right(text(choice))) if finished and is_right is not None else None,
        score=told["score"],
    )


def to_lines(branches: Sequence[RecordedBranch]) -> str:
    """The branches as lines of a file of lengths, each with its line end."""
    return "".join(
        json.dumps({key: value for key, value in asdict(branch).items() if value is not None})
        + "\n"
        for branch in branches
    )
