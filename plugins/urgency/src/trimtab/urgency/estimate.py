"""Learning, per class of workflow and stage, how long calls take and what work follows them.

Everything is learnt online from finished calls, is robust against single wild values, and takes a
bounded amount of memory whatever labels clients invent.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

END = ""
"""The absorbing state: the workflow is over. No stage has an empty name."""

_WINDOW = 64
_CLIP = 4.0
_ROW_LIMIT = 512.0
_P80 = NormalDist().inv_cdf(0.8)
_END_PRIOR = 0.1
_MAX_UNSOLVED = 64
_MAX_STATES = 128
"""States of a chain: the stages, and as many of their visits as there is room for."""
_POOLED_WEIGHT = 1.0
"""Sightings that a stage's pooled successors count as beside those of one of its visits."""
_MAX_SHARED_STAGES = 1024
_MAX_QUIET_S = 60.0
OTHER = "(other)"
"""The stage of all labels beyond a class's limit."""
MOST_VISITS = 8
"""A workflow's later visits of a stage count as this one."""

_VISIT = "\0"

V = TypeVar("V")


class Work(NamedTuple):
    """What is expected to follow a stage of a workflow.

    Attributes:
        mean_s: service time, expected.
        deviation_s: its standard deviation.
        stages: how many stages, expected.
    """

    mean_s: float
    deviation_s: float
    stages: float

    def quantile_s(self, deviations: float) -> float:
        """The service time that is so many standard deviations above the mean; 0 at least."""
        return max(0.0, self.mean_s + deviations * self.deviation_s)


NO_WORK = Work(0.0, 0.0, 0.0)


def visit_of(stage: str, visit: int) -> str:
    """The state of a chain that a workflow is in at its first, second, ... visit of a stage."""
    return f"{stage}{_VISIT}{min(visit, MOST_VISITS)}"


def _stage(state: str) -> str:
    return state.partition(_VISIT)[0]


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

    def variance(self) -> float:
        """Robustly, from the distance between the 80 % quantile and the median."""
        return ((self.quantile(0.8) - self.quantile(0.5)) / _P80) ** 2


class Chain:
    """One class of workflows as an absorbing Markov chain over its stages and their visits.

    The expected work after a stage solves ``R = P (t + R)``, where ``P`` holds the observed shares
    of the next stages and ``t`` the stages' service times; loops such as a repeated repair stage
    need no template. The variance ``V`` of that work solves
    ``V = P (v + V) + P (t + R)^2 - R^2`` with the variances ``v`` of the service times. Both are
    solved again when a twentieth of the evidence is new.

    A second repair is often the last, which a loop cannot say: so each visit of a stage (see
    `visit_of`) is a state of its own. What follows it is counted together with a little of what
    follows the stage in general, and a visit that is new goes by the stage alone.
    """

    def __init__(self) -> None:
        self._counts: dict[str, dict[str, float]] = {}
        self._seen = 0
        self._unsolved = 0
        self._work: dict[str, Work] = {}
        self.solutions = 0
        """How often the chain was solved; what it says of stages changes only then."""

    def observe(self, stage: str, successor: str, weight: float = 1.0) -> None:
        """Counts that ``successor`` (or `END`) followed ``stage``; a weight of -1 takes it back."""
        if stage not in self._counts and _VISIT in stage and len(self._counts) >= _MAX_STATES:
            return
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

    def refresh(self, service: Callable[[str], tuple[float, float]]) -> None:
        """Solves the chain again if enough evidence is new.

        Args:
            service: mean and variance of a stage's service time.
        """
        if self._unsolved > min(_MAX_UNSOLVED, self._seen // 20):
            self._solve(service)

    def after(self, state: str) -> Work:
        """The work after a stage or a visit, as last solved; none after one never left."""
        return self._work.get(state) or self._work.get(_stage(state)) or NO_WORK

    def after_s(self, stage: str, service_s: Callable[[str], float]) -> float:
        """Expected service time of all stages after ``stage``; 0 for one never seen to end."""
        self.refresh(lambda name: (service_s(name), 0.0))
        return self.after(stage).mean_s

    def _solve(self, service: Callable[[str], tuple[float, float]]) -> None:
        self._unsolved = 0
        self.solutions += 1
        stages = sorted({_stage(s) for s in self._counts} | self._successors())
        states = stages + sorted(state for state in self._counts if _VISIT in state)
        shares = self._shares({state: i for i, state in enumerate(states)}, len(stages))
        times = np.array([service(_stage(state)) for state in states]).reshape(-1, 2)
        rest = np.eye(len(states)) - shares
        ahead = np.linalg.solve(rest, np.column_stack([shares @ times[:, 0], shares.sum(axis=1)]))
        mean_s = ahead[:, 0]
        spread = shares @ (times[:, 1] + (times[:, 0] + mean_s) ** 2) - mean_s**2
        variance = np.maximum(0.0, np.linalg.solve(rest, spread))
        columns = (mean_s.tolist(), np.sqrt(variance).tolist(), ahead[:, 1].tolist())
        self._work = {state: Work(*row) for state, *row in zip(states, *columns, strict=True)}

    def _successors(self) -> set[str]:
        return {_stage(name) for row in self._counts.values() for name in row if name != END}

    def _shares(self, index: dict[str, int], stages: int) -> NDArray[np.float64]:
        """The matrix ``P``; the first rows are those of the stages, which the visits' build on."""
        shares = np.zeros((len(index), len(index)))
        for state, place in index.items():
            row = self._counts.get(state, {})
            total = sum(row.values())
            if place < stages:
                total += _END_PRIOR  # keeps loops without an end solvable
            else:
                total += _POOLED_WEIGHT
                shares[place] = shares[index[_stage(state)]] * (_POOLED_WEIGHT / total)
            for successor, count in row.items():
                if successor != END:
                    column = index.get(successor, -1)
                    shares[place, index[_stage(successor)] if column < 0 else column] += (
                        count / total
                    )
        return shares


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
        label = _stage(label) or OTHER
        if label not in stages:
            if len(stages) >= self._max_stages:
                label = OTHER
            stages.setdefault(label, StageStats())
        return label

    def learn_service(self, class_: str, stage: str, service_s: float, output_tokens: int) -> None:
        """Learns from a finished call how long its stage takes."""
        stats = self._class(class_)
        stats.service_s.add(service_s)
        stats.stages.setdefault(stage, StageStats()).add(service_s, output_tokens)
        stats.chain.touch()
        shared = _recent(self._any_class, stage, StageStats, _MAX_SHARED_STAGES)
        shared.add(service_s, output_tokens)
        self._overall.add(service_s, output_tokens)

    def learn_step(self, class_: str, state: str, successor: str, weight: float = 1.0) -> None:
        """Learns what followed a stage, or a visit of one; see `Chain.observe`."""
        chain = self._class(class_).chain
        if _VISIT in state:
            chain.observe(state, successor, weight)
        chain.observe(_stage(state), _stage(successor), weight)

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

    def work_after_s(self, class_: str, state: str) -> float:
        """Expected service time of the stages that will follow a stage, or a visit of one."""
        return self.work_after(class_, state).mean_s

    def work_after(self, class_: str, state: str) -> Work:
        """What will follow a stage, or a visit of one (see `visit_of`)."""
        stats = self._classes.get(class_)
        if stats is None:
            return NO_WORK
        self.solutions(class_)
        return stats.chain.after(state)

    def solutions(self, class_: str) -> int:
        """A number that changes when `work_after` says something new of a class."""
        stats = self._classes.get(class_)
        if stats is None:
            return 0
        stats.chain.refresh(lambda stage: self._service(class_, stage))
        return stats.chain.solutions

    def output_tokens(self, class_: str, stage: str, quantile: float = 0.5) -> float | None:
        """A quantile of a stage's output lengths; None for a stage of which nothing is known."""
        known = self._known(class_, stage)
        return None if known is None else known.output_tokens.quantile(quantile)

    def _service(self, class_: str, stage: str) -> tuple[float, float]:
        known = self._known(class_, stage)
        if known is None:
            return self.service_s(class_, stage), 0.0
        return known.service_s.mean(), known.service_s.variance()

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
