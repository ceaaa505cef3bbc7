"""What clients may say of a request with branches: the fields of ``vllm_xargs``."""

from __future__ import annotations

from collections.abc import Mapping

from trimtab.core.policy import CallField

MAX_BRANCHES = 256
_MAX_TOKENS = 10_000_000
_TEXT_LIMIT = 512
_REPLAY_LIMIT = 65_536

FIELDS: Mapping[str, CallField] = {
    "branches": CallField(
        int, "branches to launch (N); the request's n", minimum=1, maximum=MAX_BRANCHES
    ),
    "enough": CallField(
        int,
        "finished branches after which the request is answered (M)",
        minimum=1,
        maximum=MAX_BRANCHES,
    ),
    "score_every": CallField(
        int, "output tokens between two scorings of a branch (T)", minimum=1, maximum=_MAX_TOKENS
    ),
    "prune_below": CallField(
        float,
        "score under which a branch is pruned while none has finished (alpha)",
        minimum=0,
        maximum=1,
    ),
    "max_pruned": CallField(
        int,
        "most branches pruned while none has finished (beta)",
        minimum=0,
        maximum=MAX_BRANCHES,
    ),
    "pruning": CallField(str, "safe, paper, below, pressure or off", minimum=1, maximum=16),
    "answer": CallField(
        str, "which answer wins: best, majority, weighted or shortest", minimum=1, maximum=16
    ),
    "extract": CallField(
        str,
        "where the answer stands in a text: none, boxed, final, json:FIELD or regex:PATTERN",
        minimum=1,
        maximum=_TEXT_LIMIT,
    ),
    "show": CallField(str, "one answer, or all branches", minimum=1, maximum=16),
    "progress": CallField(
        int, "1: a stream tells how the branches are getting on", minimum=0, maximum=1
    ),
    "replay": CallField(
        str,
        "scores for the signal of that name, for experiments: JSON, a list of scores a branch",
        minimum=1,
        maximum=_REPLAY_LIMIT,
    ),
}
"""By the name behind ``trimtab.`` in ``vllm_xargs``."""
