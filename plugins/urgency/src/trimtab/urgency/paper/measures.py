"""The paper's figures: the smallest deadline that holds, the rate that can be sustained."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from trimtab.core.simulate.result import WorkflowRecord
from trimtab.core.workload import Request
from trimtab.urgency.paper.hardware import CLUSTERS, SEATS
from trimtab.urgency.paper.serving import Side, middle, serve
from trimtab.urgency.paper.traces import (
    TRACES,
    Deadlines,
    capacity_per_s,
    template_s,
    with_deadlines,
    workflows,
)
from trimtab.urgency.text_to_sql.figures import percentile

ATTAINED = 0.95
"""Share of the workflows that must be in time."""
_STEP = 1.2
_HALVINGS = 4
"""The smallest scale is found to within the step's 16th root, about 1 %."""
_RATE_HALVINGS = 6
_RATES = (0.15, 1.3)


@dataclass(frozen=True, slots=True)
class Cell:
    """A place in the comparison.

    Attributes:
        cluster: name of the GPUs.
        trace: name of the trace.
        load: arrivals as a share of what full batches on all GPUs would end.
        seats: calls that each replica runs at once.
    """

    cluster: str
    trace: str
    load: float
    seats: int = SEATS

    @property
    def name(self) -> str:
        """For reports."""
        return f"{self.cluster}/{self.trace}/load-{self.load:g}"

    @property
    def base_s(self) -> float:
        """The paper's base of deadlines."""
        return template_s(CLUSTERS[self.cluster])

    def requests(self, count: int, seed: int) -> list[Request]:
        """The calls of ``count`` workflows, without deadlines."""
        trace = TRACES[self.trace]
        rate_per_s = self.load * capacity_per_s(trace, CLUSTERS[self.cluster], self.seats)
        return workflows(trace, count, rate_per_s, seed)


class Scene:
    """One cell and seed, on which all sides are measured.

    Args:
        cell: the cell.
        count: how many workflows arrive.
        seed: what is drawn depends on it, and is the same for all sides.
        classes: factors of the deadlines' classes.
    """

    def __init__(
        self, cell: Cell, count: int, seed: int, classes: tuple[float, ...] = (1.0,)
    ) -> None:
        self._cell, self._classes = cell, classes
        self._requests = cell.requests(count, seed)
        self._runs: dict[tuple[str, float], list[WorkflowRecord]] = {}

    def run(self, side: Side, scale: float) -> list[WorkflowRecord]:
        """The middle workflows under a side, with deadlines of this scale; simulated once."""
        key = (side.name, scale)
        if key not in self._runs:
            self._runs[key] = self._serve(side, scale)
        return self._runs[key]

    def _serve(self, side: Side, scale: float) -> list[WorkflowRecord]:
        cell = self._cell
        deadlines = Deadlines(cell.base_s, scale, self._classes)
        requests = with_deadlines(self._requests, deadlines)
        return middle(serve(side, CLUSTERS[cell.cluster], requests, cell.seats))

    def latencies_s(self, side: Side) -> list[float]:
        """Under a side that knows no deadlines."""
        return [record.latency_s for record in self.run(side, 1.0)]

    def scale_met(self, side: Side, share: float = ATTAINED, near: float = 3.0) -> float:
        """The smallest deadline scale that this share of the workflows meets.

        Exact for a side that knows no deadlines and for deadlines of one class; else found by
        halving from a scale it may be near, and one that was seen to hold.
        """
        if not side.knows_deadlines and len(self._classes) == 1:
            return percentile(self.latencies_s(side), share) / self._cell.base_s

        def holds(scale: float) -> bool:
            return in_time(self.run(side, scale)) >= share

        return _smallest(holds, near)


def in_time(records: Sequence[WorkflowRecord]) -> float:
    """Share of the workflows that met their deadlines."""
    return mean(record.met for record in records)


def tardiness_s(record: WorkflowRecord) -> float:
    """How late a workflow is; 0 in time."""
    return max(0.0, record.latency_s - (record.deadline_s or math.inf))


def sustained_load(
    side: Side, cluster: str, trace: str, *, scale: float, count: int, seed: int
) -> float:
    """The largest load at which `ATTAINED` of the workflows meet deadlines of a scale."""
    low, high = _RATES
    for _ in range(_RATE_HALVINGS):
        load = (low * high) ** 0.5
        scene = Scene(Cell(cluster, trace, load), count, seed)
        if in_time(scene.run(side, scale)) >= ATTAINED:
            low = load
        else:
            high = load
    return low


def _smallest(holds: Callable[[float], bool], start: float) -> float:
    """About the smallest number that holds, between powers of `_STEP` of the start."""
    high = start
    while not holds(high):
        high *= _STEP
    low = high / _STEP
    if high == start:
        while holds(low):
            high, low = low, low / _STEP
    for _ in range(_HALVINGS):
        between = (low * high) ** 0.5
        if holds(between):
            high = between
        else:
            low = between
    return high
