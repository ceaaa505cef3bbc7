"""Learning, per class of workflow and stage, how long calls take and what work follows them.

Everything is learnt online from finished calls, is robust against single wild values, and takes a
bounded amount of memory whatever labels clients invent.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TypeVar

import numpy as np

END = ""
"""The absorbing state: the workflow is over. No stage has an empty name."""

_WINDOW = 64
_CLIP = 4.0
_ROW_LIMIT = 512.0
_END_PRIOR = 0.1
_MAX_UNSOLVED = 64
_MAX_SHARED_STAGES = 1024
_MAX_QUIET_S = 60.0
OTHER = "(other)"
"""The stage of all labels beyond a class's limit."""

V = TypeVar("V")


class Window:
    """The last 64 values of a quantity: quantiles, and a mean that no single value can move far."""

    __slots__ = ("_mean", "_order", "_sorted")

    def __init__(self) -> None:
        self._order: deque[float] = deque()
        self._sorted: list[float] = []
        self._mean: float | None = None

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, value: float) -> None:
        """Takes a value in and, once the window is full, drops the oldest."""
        if len(self._order) == _WINDOW:
            del self._sorted[bisect_left(self._sorted, self._order.popleft())]
        self._order.append(value)
        insort(self._sorted, value)
        self._mean = None

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of the window lies (the lower one, not a mix)."""
        return self._sorted[int(q * (len(self._sorted) - 1))]

    def mean(self) -> float:
        """The mean, with values beyond 4 times the median counted as 4 times the median."""
        if self._mean is None:
            most = _CLIP * self.quantile(0.5)
            self._mean = sum(min(value, most) for value in self._sorted) / len(self._sorted)
        return self._mean


class Chain:
    """One class of workflows as an absorbing Markov chain over its stages.

    The expected work after a stage solves ``R = P (t + R)``, where ``P`` holds the observed shares
    of the next stages and ``t`` the stages' service times; loops such as a repeated repair stage
    need no template. The system is solved again when a twentieth of the evidence is new.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, float]] = {}
        self._seen = 0
        self._unsolved = 0
        self._after_s: dict[str, float] = {}

    def observe(self, stage: str, successor: str, weight: float = 1.0) -> None:
        """Counts that ``successor`` (or `END`) followed ``stage``; a weight of -1 takes it back."""
        row = self._counts.setdefault(stage, {})
        row[successor] = max(0.0, row.get(successor, 0.0) + weight)
        if sum(row.values()) > _ROW_LIMIT:  # forget slowly, so that a changed agent is learnt anew
            for name in row:
                row[name] /= 2
        self.touch()

    def touch(self) -> None:
        """Notes a new piece of evidence."""
        self._seen += 1
        self._unsolved += 1

    def after_s(self, stage: str, service_s: Callable[[str], float]) -> float:
        """Expected service time of all stages after ``stage``; 0 for one never seen to end."""
        if self._unsolved > min(_MAX_UNSOLVED, self._seen // 20):
            self._solve(service_s)
        return self._after_s.get(stage, 0.0)

    def _solve(self, service_s: Callable[[str], float]) -> None:
        self._unsolved = 0
        stages = sorted(self._counts.keys() | {s for row in self._counts.values() for s in row})
        stages = [stage for stage in stages if stage != END]
        index = {stage: i for i, stage in enumerate(stages)}
        shares = np.zeros((len(stages), len(stages)))
        for stage, row in self._counts.items():
            total = sum(row.values()) + _END_PRIOR  # the prior keeps loops without an end solvable
            for successor, count in row.items():
                if successor != END:
                    shares[index[stage], index[successor]] = count / total
        times_s = np.array([service_s(stage) for stage in stages])
        after_s = np.linalg.solve(np.eye(len(stages)) - shares, shares @ times_s)
        self._after_s = dict(zip(stages, after_s.tolist(), strict=True))


class _ClassStats:
    """What is known of one class of workflows."""

    def __init__(self) -> None:
        self.service_s = Window()
        self.gap_s = Window()
        self.stages: dict[str, StageStats] = {}
        self.chain = Chain()


class StageStats:
    """Service times, output lengths and seconds per output token of one stage."""

    __slots__ = ("output_tokens", "s_per_token", "service_s")

    def __init__(self) -> None:
        self.service_s = Window()
        self.output_tokens = Window()
        self.s_per_token = Window()

    def add(self, service_s: float, output_tokens: int) -> None:
        """Takes one finished call in."""
        self.service_s.add(service_s)
        self.output_tokens.add(float(output_tokens))
        self.s_per_token.add(service_s / max(1, output_tokens))


class Estimator:
    """Service times and remaining work by class and stage.

    What a class's stage has not shown yet is taken from the same stage of other classes, then from
    the class's other stages, then from the call's length and the seconds per token seen so far.

    Args:
        max_classes: how many classes are kept, the least recently seen being forgotten first.
        max_stages: how many stages of a class are told apart; the others share one entry.
    """

    def __init__(self, *, max_classes: int = 256, max_stages: int = 64) -> None:
        self._max_classes, self._max_stages = max_classes, max_stages
        self._classes: OrderedDict[str, _ClassStats] = OrderedDict()
        self._any_class: OrderedDict[str, StageStats] = OrderedDict()
        self._overall = StageStats()

    def __len__(self) -> int:
        return len(self._classes)

    def stage_of(self, class_: str, label: str) -> str:
        """The stage under which a label is kept: itself, or `OTHER` beyond the limit."""
        stages = self._class(class_).stages
        if label in stages or len(stages) < self._max_stages:
            stages.setdefault(label, StageStats())
            return label
        stages.setdefault(OTHER, StageStats())
        return OTHER

    def learn_service(self, class_: str, stage: str, service_s: float, output_tokens: int) -> None:
        """Learns from a finished call how long its stage takes."""
        stats = self._class(class_)
        stats.service_s.add(service_s)
        stats.stages.setdefault(stage, StageStats()).add(service_s, output_tokens)
        stats.chain.touch()
        shared = _recent(self._any_class, stage, StageStats, _MAX_SHARED_STAGES)
        shared.add(service_s, output_tokens)
        self._overall.add(service_s, output_tokens)

    def learn_step(self, class_: str, stage: str, successor: str, weight: float = 1.0) -> None:
        """Learns what followed a stage; see `Chain.observe`."""
        self._class(class_).chain.observe(stage, successor, weight)

    def learn_gap(self, class_: str, gap_s: float) -> None:
        """Learns for how long a workflow was quiet between two stages (its tools, its user)."""
        self._class(class_).gap_s.add(gap_s)

    def quiet_s(self, class_: str) -> float:
        """How long a workflow of a class may be quiet before it seems to be over."""
        stats = self._classes.get(class_)
        if stats is None or not len(stats.gap_s):
            return 0.0
        return min(_MAX_QUIET_S, 4 * stats.gap_s.quantile(0.9))

    def service_s(
        self, class_: str, stage: str, *, output_tokens: int | None = None, longest: int = 0
    ) -> float:
        """Expected time from a call's admission to its end.

        Args:
            class_: the class of workflow.
            stage: the stage.
            output_tokens: the output's length where the client foretells it.
            longest: the call's limit of output tokens, used when nothing else is known; 0: none.
        """
        known = self._known(class_, stage)
        if output_tokens is not None and len(self._overall.s_per_token):
            return output_tokens * (known or self._overall).s_per_token.mean()
        if known is not None:
            return known.service_s.mean()
        stats = self._classes.get(class_)
        if stats is not None and len(stats.service_s):
            return stats.service_s.mean()
        if len(self._overall.s_per_token):
            usual = self._overall.output_tokens.mean()
            return min(usual, longest or usual) * self._overall.s_per_token.mean()
        return 0.0

    def work_after_s(self, class_: str, stage: str) -> float:
        """Expected service time of the stages that will follow ``stage``."""
        stats = self._classes.get(class_)
        if stats is None:
            return 0.0
        return stats.chain.after_s(stage, lambda s: self.service_s(class_, s))

    def _known(self, class_: str, stage: str) -> StageStats | None:
        stats = self._classes.get(class_)
        for stages in (stats.stages if stats is not None else {}, self._any_class):
            found = stages.get(stage)
            if found is not None and len(found.service_s):
                return found
        return None

    def _class(self, class_: str) -> _ClassStats:
        return _recent(self._classes, class_, _ClassStats, self._max_classes)


def _recent(table: OrderedDict[str, V], name: str, make: Callable[[], V], limit: int) -> V:
    """The entry of a name, made where missing; the least recently used one makes room for it."""
    found = table.get(name)
    if found is None:
        if len(table) >= limit:
            table.popitem(last=False)
        found = table[name] = make()
    else:
        table.move_to_end(name)
    return found
