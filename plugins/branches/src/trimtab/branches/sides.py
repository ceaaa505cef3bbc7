"""The ways to answer a question that the benchmarks compare, as what each asks of the plugin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trimtab.branches.drawn import Question
from trimtab.core.policy import FieldValue

BRANCHES = 8
ENOUGH = 4
PAPER_ALPHA = 0.5
WARM_UP_SHARE = 0.1
"""Of the branches of a warm-up, those that DeepConf's threshold would have ended."""


@dataclass(frozen=True, slots=True)
class Side:
    """A way to answer questions.

    Attributes:
        name: as in reports.
        branches: launched for each question.
        fields: what a request says of them.
        options: what the server's configuration says.
        answer: which finished branch answers.
    """

    name: str
    branches: int
    fields: Mapping[str, FieldValue] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    answer: str = "best"


# The published rules leave a full cache to the engine, which preempts.
_PLAIN = {"bend": False, "certainty": None, "forget_pruned": False, "relieve": False}
_ALL = {"enough": BRANCHES}

VANILLA = Side("vanilla", 1)
SELF_CONSISTENCY = Side(
    "self-consistency", BRANCHES, {**_ALL, "pruning": "off"}, _PLAIN, "majority"
)
BEST_OF_N = Side("best-of-n", BRANCHES, {**_ALL, "pruning": "off"}, _PLAIN)
EARLY_STOP = Side("early-stop", BRANCHES, {"enough": ENOUGH, "pruning": "off"}, _PLAIN)
PRUNING = Side(
    "pruning", BRANCHES, {**_ALL, "pruning": "paper", "prune_below": PAPER_ALPHA}, _PLAIN
)
STEP = Side("step-pressure", BRANCHES, {**_ALL, "pruning": "pressure"}, {**_PLAIN, "relieve": True})
PAPER = Side(
    "sart-paper",
    BRANCHES,
    {"enough": ENOUGH, "pruning": "paper", "prune_below": PAPER_ALPHA},
    _PLAIN,
)
OURS = Side("trimtab", BRANCHES)


def deepconf(threshold: float) -> Side:
    """DeepConf's rule (arXiv:2508.15260, online mode), and a weighted vote.

    Args:
        threshold: what falls under it is ended; the lowest `WARM_UP_SHARE` of questions answered
            in full before.
    """
    fields: dict[str, FieldValue] = {**_ALL, "pruning": "below", "prune_below": threshold}
    return Side("deepconf-threshold", BRANCHES, fields, _PLAIN, "weighted")


def lowest_scores(warm_up: Sequence[Question]) -> float:
    """DeepConf's threshold by drawn questions: of their branches' lowest scores."""
    lowest = [min(rewards) for question in warm_up for rewards in question.rewards]
    return float(np.quantile(lowest, WARM_UP_SHARE))
