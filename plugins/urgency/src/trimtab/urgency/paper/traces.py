"""Workflows with the statistics of the paper's three traces: a CHESS-like text-to-SQL agent."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from trimtab.core.workload import Request
from trimtab.urgency.paper.hardware import CROWDING, SEATS, Cluster, Gpu

RETRIEVE = "retrieve"
KEYWORDS = "keywords"
GENERATE = "generate"
REVISE = "revise"
TEST = "test"
WRITE_TEST = "write-test"
EVALUATE = "evaluate"

TEMPLATE = (
    *(RETRIEVE, KEYWORDS, RETRIEVE, RETRIEVE, RETRIEVE, GENERATE),
    *(REVISE, REVISE, REVISE, REVISE, TEST, WRITE_TEST, TEST, EVALUATE, TEST),
)
"""The stages that the paper's budgets expect of every workflow."""
CANDIDATES = 2


@dataclass(frozen=True, slots=True)
class Length:
    """A truncated lognormal distribution of a number of tokens."""

    median: float
    sigma: float
    least: int
    most: int

    @property
    def mean(self) -> float:
        """About its mean: that of the whole distribution, within the limits."""
        return min(max(self.median * math.exp(self.sigma**2 / 2), self.least), self.most)

    def draw(self, chance: random.Random) -> int:
        """One length."""
        value = self.median * math.exp(self.sigma * chance.gauss(0, 1))
        return round(min(max(value, self.least), self.most))


@dataclass(frozen=True, slots=True)
class Stage:
    """How long the calls of a stage are."""

    prompt: Length
    output: Length


_ANY_DATABASE = {
    RETRIEVE: Stage(Length(304, 0.01, 301, 312), Length(5, 0.6, 4, 32)),
    KEYWORDS: Stage(Length(670, 0.03, 636, 711), Length(40, 0.5, 15, 93)),
    TEST: Stage(Length(275, 0.01, 271, 278), Length(4, 0.15, 4, 6)),
    WRITE_TEST: Stage(Length(1150, 0.14, 900, 1460), Length(100, 0.3, 42, 128)),
}
DATABASES: Mapping[str, Mapping[str, Stage]] = {
    "financial": {
        **_ANY_DATABASE,
        GENERATE: Stage(Length(9800, 0.19, 7900, 14_000), Length(655, 0.27, 300, 1100)),
        REVISE: Stage(Length(5900, 0.06, 5700, 8900), Length(80, 0.36, 12, 1009)),
        EVALUATE: Stage(Length(1000, 0.2, 750, 1900), Length(22, 0.4, 22, 72)),
    },
    "formula1": {
        **_ANY_DATABASE,
        GENERATE: Stage(Length(11_800, 0.12, 7900, 14_000), Length(715, 0.27, 300, 1100)),
        REVISE: Stage(Length(7800, 0.08, 5700, 8900), Length(116, 0.6, 12, 1009)),
        EVALUATE: Stage(Length(1240, 0.2, 750, 1900), Length(22, 0.4, 22, 72)),
    },
}
"""The lengths by database and stage, fitted to the traces' 5th, 50th and 95th percentiles."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What workflows are made of.

    Attributes:
        formula1: share of the workflows on the larger database.
        revisions: relative frequency of 0, 1, 2, … revisions.
        evaluations: frequency of each number of parallel evaluations.
    """

    name: str
    formula1: float
    revisions: Sequence[float]
    evaluations: Mapping[int, float]


TRACES: Mapping[str, Trace] = {
    trace.name: trace
    for trace in (
        Trace("trace-1", 0.0, [0.9**r for r in range(10)], {4: 0.3, 5: 0.5, 6: 0.2}),
        Trace("trace-2", 1.0, [0.99**r for r in range(10)], {4: 0.1, 5: 0.4, 6: 0.5}),
        Trace("trace-3", 8 / 30, [1.0] * 11, {4: 0.25, 5: 0.4, 6: 0.35}),
    )
}


@dataclass(frozen=True, slots=True)
class Deadlines:
    """What the workflows are allowed, relative to each one's arrival.

    Attributes:
        base_s: the paper's base, the template's time averaged over the GPUs.
        scale: what the base is multiplied by.
        classes: further factors, one of which each workflow gets; tight and loose ones.
    """

    base_s: float
    scale: float
    classes: tuple[float, ...] = (1.0,)


MIXED = (0.6, 1.0, 1.6)


def stage_of(request: Request) -> Stage:
    """The stage type of a request of these traces."""
    return DATABASES[database_of(str(request.workflow))][str(request.stage)]


def database_of(workflow: str) -> str:
    """The database a workflow's name tells."""
    return workflow.partition("/")[0]


def usual_s(gpu: Gpu, stage: Stage) -> float:
    """The usual time of a stage's call on a GPU, alone."""
    return gpu.prefill_s(round(stage.prompt.mean)) + gpu.decode_s(stage.output.mean)


def template_s(cluster: Cluster) -> float:
    """The paper's base of deadlines: the template's stages, averaged over the GPUs."""
    stages = DATABASES["financial"]
    return mean(sum(usual_s(gpu, stages[name]) for name in TEMPLATE) for gpu in cluster)


def workflows(trace: Trace, count: int, rate_per_s: float, seed: int) -> list[Request]:
    """The calls of workflows that arrive at random (Poisson); they have no deadlines yet."""
    chance = random.Random(f"{trace.name}/{seed}")
    requests: list[Request] = []
    arrival_s = 0.0
    for number in range(count):
        arrival_s += chance.expovariate(1.0) / rate_per_s
        requests += _workflow(trace, number, arrival_s, chance)
    return requests


def with_deadlines(requests: Sequence[Request], deadlines: Deadlines) -> list[Request]:
    """The same calls with deadlines; the classes take turns."""
    classes = deadlines.classes
    numbers: dict[str | None, int] = {}
    allowed_s = [deadlines.base_s * deadlines.scale * factor for factor in classes]
    return [
        replace(
            request,
            deadline_s=allowed_s[numbers.setdefault(request.workflow, len(numbers)) % len(classes)],
        )
        for request in requests
    ]


def capacity_per_s(trace: Trace, cluster: Cluster, seats: int = SEATS) -> float:
    """Workflows per second that full batches on all GPUs end, if each has its even part."""
    sample = workflows(trace, 400, 1.0, seed=-1)
    prompt_tokens = sum(r.prompt_tokens for r in sample) / 400
    output_tokens = sum(r.output_tokens for r in sample) / 400
    step_share = (1 + CROWDING * (seats - 1)) / seats
    return sum(
        1 / (gpu.prefill_s(round(prompt_tokens)) + gpu.decode_s(output_tokens) * step_share)
        for gpu in cluster
    )


def round_robin_load(trace: Trace, cluster: Cluster, share: float) -> float:
    """The load at which the slowest GPU is busy for a share of its time if all get as much."""
    slowest = min(capacity_per_s(trace, (gpu,)) for gpu in cluster)
    return share * len(cluster) * slowest / capacity_per_s(trace, cluster)


def _workflow(trace: Trace, number: int, arrival_s: float, chance: random.Random) -> list[Request]:
    database = "formula1" if chance.random() < trace.formula1 else "financial"
    revisions = chance.choices(range(len(trace.revisions)), trace.revisions)[0]
    evaluations = chance.choices(list(trace.evaluations), list(trace.evaluations.values()))[0]
    widths = [
        *((name, 1) for name in TEMPLATE[: TEMPLATE.index(GENERATE)]),
        (GENERATE, CANDIDATES),
        *([(REVISE, 1)] * revisions),
        *((name, 1) for name in (TEST, WRITE_TEST, TEST)),
        (EVALUATE, evaluations),
        (TEST, 1),
    ]
    name = f"{database}/{number}"
    calls: list[Request] = []
    before: tuple[str, ...] = ()
    for place, (stage, width) in enumerate(widths):
        lengths = DATABASES[database][stage]
        siblings = [
            Request(
                request_id=f"{name}/{place}.{sibling}",
                arrival_s=arrival_s,
                prompt_tokens=lengths.prompt.draw(chance),
                output_tokens=lengths.output.draw(chance),
                workflow=name,
                stage=stage,
                depends_on=before,
            )
            for sibling in range(width)
        ]
        calls += siblings
        before = tuple(call.request_id for call in siblings)
    return calls
