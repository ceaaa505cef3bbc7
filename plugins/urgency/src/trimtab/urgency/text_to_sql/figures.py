"""What a crowd's visits come to, in the figures that users care about."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from trimtab.urgency.text_to_sql.crowd import Journey


class Figures(BaseModel):
    """One side of a comparison: latencies from a question to its answer, over all workflows.

    The deadline scale is the factor on all deadlines with which 95 % would have been in time.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    workflows: int
    workflows_within_deadline: int
    mean_latency_s: float
    p95_latency_s: float
    p95_tardiness_s: float
    deadline_scale: float
    throughput_per_s: float
    calls: int
    output_tokens: int
    queries_that_run: int


@dataclass(frozen=True, slots=True)
class Metric:
    """One of the figures that a comparison shows.

    Attributes:
        name: the field of `Figures`.
        title: its heading in a table.
        unit: its unit.
        better: which way is better.
        floor: values below count as this one in ratios, which would else divide by nothing.
    """

    name: str
    title: str
    unit: str
    better: Literal["lower", "higher"]
    floor: float

    def of(self, figures: Figures) -> float:
        """The metric's value."""
        return float(getattr(figures, self.name))

    def ratio(self, baseline: Figures, ours: Figures) -> float:
        """Above 1 when ours is better."""
        a, b = (max(self.of(side), self.floor) for side in (baseline, ours))
        return a / b if self.better == "lower" else b / a


METRICS = (
    Metric("workflows_within_deadline", "workflows within deadline", "1", "higher", 1.0),
    Metric("mean_latency_s", "mean latency", "s", "lower", 0.001),
    Metric("p95_latency_s", "p95 latency", "s", "lower", 0.001),
    Metric("p95_tardiness_s", "p95 lateness", "s", "lower", 1.0),
    Metric("throughput_per_s", "throughput", "1/s", "higher", 0.001),
)


DEADLINE_SCALE = Metric("deadline_scale", "deadline scale", "1", "lower", 0.001)


def percentile(values: Iterable[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def figures(journeys: Sequence[Journey]) -> Figures:
    """The figures of at least one journey."""
    latencies_s = [journey.latency_s for journey in journeys]
    return Figures(
        workflows=len(journeys),
        workflows_within_deadline=sum(journey.tardiness_s == 0 for journey in journeys),
        mean_latency_s=mean(latencies_s),
        p95_latency_s=percentile(latencies_s, 0.95),
        p95_tardiness_s=percentile((journey.tardiness_s for journey in journeys), 0.95),
        deadline_scale=percentile((j.latency_s / j.visit.deadline_s for j in journeys), 0.95),
        throughput_per_s=len(journeys) / max(journey.finished_s for journey in journeys),
        calls=sum(len(journey.answer.stages) for journey in journeys),
        output_tokens=sum(journey.output_tokens for journey in journeys),
        queries_that_run=sum(journey.answer.error is None for journey in journeys),
    )
