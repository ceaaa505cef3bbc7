"""Made-up workloads with a seed: arrivals, lengths, and workflows of dependent stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from trimtab.core.errors import BadInput
from trimtab.core.workload import Request, Workload

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


class Lengths(Protocol):
    """A distribution of token counts."""

    def sample(self, rng: np.random.Generator, size: int) -> Integers:
        """``size`` counts of at least 1; shape ``(size,)``."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same count."""

    tokens: int

    def sample(self, rng: np.random.Generator, size: int) -> Integers:
        """See `Lengths`."""
        return np.full(size, max(1, self.tokens), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """Lognormal counts, clipped to ``[low, high]``.

    Attributes:
        median: the median count.
        sigma: standard deviation of the logarithm.
        low, high: the least and the most.
    """

    median: float
    sigma: float
    low: int = 1
    high: int = 1_000_000

    @classmethod
    def between(cls, p5: float, p50: float, p95: float) -> Lognormal:
        """The one with a median and about these 5 % and 95 % quantiles, clipped near them."""
        sigma = math.log(p95 / p5) / (2 * 1.6449)
        return cls(p50, sigma, low=max(1, round(p5 * 0.8)), high=round(p95 * 1.25))

    def sample(self, rng: np.random.Generator, size: int) -> Integers:
        """See `Lengths`."""
        drawn = rng.lognormal(math.log(self.median), self.sigma, size)
        return np.clip(np.rint(drawn), self.low, self.high).astype(np.int64)


def poisson(
    rate_per_s: float,
    requests: int,
    *,
    prompt: Lengths,
    output: Lengths,
    seed: int = 0,
    name: str = "poisson",
) -> Workload:
    """Independent requests with Poisson arrivals.

    Args:
        rate_per_s: mean arrivals per second.
        requests: how many.
        prompt: distribution of prompt tokens.
        output: distribution of output tokens.
        seed: the same seed gives the same workload.
        name: the workload's name.

    Raises:
        BadInput: the rate or the number of requests is not positive.
    """
    return gamma_bursts(
        rate_per_s, requests, cv=1.0, prompt=prompt, output=output, seed=seed, name=name
    )


def gamma_bursts(
    rate_per_s: float,
    requests: int,
    *,
    cv: float = 2.0,
    prompt: Lengths,
    output: Lengths,
    seed: int = 0,
    name: str = "gamma-bursts",
) -> Workload:
    """Independent requests with gamma-distributed gaps between them.

    Args:
        rate_per_s: mean arrivals per second.
        requests: how many.
        cv: coefficient of variation of the gaps; 1 is Poisson, above 1 comes in bursts.
        prompt: distribution of prompt tokens.
        output: distribution of output tokens.
        seed: the same seed gives the same workload.
        name: the workload's name.

    Raises:
        BadInput: the rate, the number of requests or ``cv`` is not positive.
    """
    rng = np.random.default_rng(seed)
    arrivals = gamma_arrivals(rng, rate_per_s, requests, cv)
    prompts, outputs = prompt.sample(rng, requests), output.sample(rng, requests)
    drawn = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return Workload(tuple(Request(f"r{i}", *values) for i, values in enumerate(drawn)), name)


def gamma_arrivals(
    rng: np.random.Generator, rate_per_s: float, size: int, cv: float = 1.0
) -> Floats:
    """Increasing arrival times in seconds with gamma gaps of mean ``1 / rate_per_s``.

    Raises:
        BadInput: an argument is not positive.
    """
    for key, value in (("rate_per_s", rate_per_s), ("size", size), ("cv", cv)):
        if not 0 < value < math.inf:
            raise BadInput(f"{key} is {value}", fix="give a number above 0")
    shape = 1 / cv**2
    return np.cumsum(rng.gamma(shape, 1 / (rate_per_s * shape), size))


def with_arrivals(
    workload: Workload, rate_per_s: float, *, cv: float = 1.0, seed: int = 0
) -> Workload:
    """The same requests with new arrivals; those of one workflow stay together.

    Args:
        workload: what arrives, in this order.
        rate_per_s: workflows, and requests outside any, per second.
        cv: as in `gamma_bursts`.
        seed: the same seed gives the same arrivals.

    Raises:
        BadInput: the rate or ``cv`` is not positive.
    """
    units = [request.workflow or request.request_id for request in workload]
    first_s = {
        unit: request.arrival_s for unit, request in reversed([*zip(units, workload, strict=True)])
    }
    order = list(dict.fromkeys(units))
    if not order:
        return workload
    times = gamma_arrivals(np.random.default_rng(seed), rate_per_s, len(order), cv)
    arrival_s = dict(zip(order, times.tolist(), strict=True))
    moved = (
        replace(request, arrival_s=arrival_s[unit] + request.arrival_s - first_s[unit])
        for unit, request in zip(units, workload, strict=True)
    )
    return Workload(tuple(moved), workload.name)


@dataclass(frozen=True, slots=True)
class StageLengths:
    """Tokens of the calls of one stage; ``prefix_tokens`` of each prompt are its template."""

    prompt: Lengths
    output: Lengths
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkflowClass:
    """A kind of text-to-SQL question.

    Attributes:
        name: of the class.
        mean_revisions: mean of the geometric number of revisions.
        stages: lengths by stage.
    """

    name: str
    mean_revisions: float
    stages: Mapping[str, StageLengths]


def _text_to_sql(
    name: str, mean_revisions: float, generate: StageLengths, revise: StageLengths
) -> WorkflowClass:
    between = Lognormal.between
    return WorkflowClass(
        name,
        mean_revisions,
        {
            "retrieve": StageLengths(between(301, 304, 312), between(4, 5, 32), 213),
            "keywords": StageLengths(between(636, 667, 711), between(15, 45, 93), 630),
            "generate": generate,
            "revise": revise,
            "unit_tester": StageLengths(between(271, 275, 278), between(4, 4, 6), 213),
            "generate_unit_test": StageLengths(
                between(900, 1150, 1460), between(42, 103, 128), 436
            ),
            "evaluate": StageLengths(between(750, 1050, 1900), between(22, 22, 72), 261),
        },
    )


FINANCIAL = _text_to_sql(
    "financial",
    0.73,
    StageLengths(Lognormal.between(7900, 9400, 14000), Lognormal.between(413, 650, 1010), 5292),
    StageLengths(Lognormal.between(5700, 5900, 8900), Lognormal.between(12, 80, 400), 3059),
)
FORMULA1 = _text_to_sql(
    "formula1",
    1.5,
    StageLengths(Lognormal.between(9158, 11500, 14000), Lognormal.between(413, 700, 1010), 9158),
    StageLengths(Lognormal.between(5700, 7900, 8900), Lognormal.between(12, 116, 1009), 3059),
)


def agent_workflows(
    workflows: int,
    rate_per_s: float,
    *,
    seed: int = 0,
    classes: Sequence[tuple[WorkflowClass, float]] = ((FINANCIAL, 1.0), (FORMULA1, 1.0)),
    revisions: Literal["uniform", "geometric"] = "uniform",
    candidates: int = 2,
    deadline_s: tuple[float, float] = (165.0, 815.0),
    tool_gap_s: float = 0.0,
    cv: float = 1.0,
    name: str = "agent-workflows",
) -> Workload:
    """Text-to-SQL agents in the shape of CHESS (arXiv:2405.16755), as HexGen-Flow replays them.

    Retrieve, keywords, three more retrievals; ``candidates`` parallel generations; revisions one
    after another; unit tests written, and 4 to 6 evaluations in parallel; a last choice. Lengths,
    loop counts and template sizes follow the statistics of the traces of arXiv:2505.05286.

    Args:
        workflows: how many.
        rate_per_s: mean workflow arrivals per second.
        seed: the same seed gives the same workload.
        classes: the classes with their weights.
        revisions: 0 to 10 evenly as in the paper's re-balanced traces, or geometric as in the raw
            ones.
        candidates: parallel generations.
        deadline_s: each workflow's deadline is drawn evenly between these; by default 3 to 14.8
            times the 55 s that the paper's mixed cluster takes for one.
        tool_gap_s: time of a tool call between two stages (running the SQL, say).
        cv: coefficient of variation of the arrivals' gaps.
        name: the workload's name.

    Raises:
        BadInput: a number is not positive.
    """
    if candidates < 1:
        raise BadInput(f"candidates is {candidates}", fix="give at least 1")
    if not 0 < deadline_s[0] <= deadline_s[1]:
        raise BadInput(f"deadline_s is {deadline_s}", fix="give two numbers above 0, least first")
    rng = np.random.default_rng(seed)
    share = np.array([weight for _, weight in classes], dtype=np.float64)
    arrivals = gamma_arrivals(rng, rate_per_s, workflows, cv)
    requests: list[Request] = []
    for index, arrival_s in enumerate(arrivals.tolist()):
        kind = classes[int(rng.choice(len(classes), p=share / share.sum()))][0]
        chain = _Chain(rng, kind, f"w{index}", arrival_s, rng.uniform(*deadline_s), tool_gap_s)
        _chess(chain, candidates, _revision_count(rng, kind, revisions))
        requests += chain.requests
    return Workload(tuple(requests), name)


def _revision_count(
    rng: np.random.Generator, kind: WorkflowClass, revisions: Literal["uniform", "geometric"]
) -> int:
    if revisions == "uniform":
        return int(rng.integers(0, 11))
    return min(10, int(rng.geometric(1 / (1 + kind.mean_revisions))) - 1)


def _chess(chain: _Chain, candidates: int, revisions: int) -> None:
    chain.stage("retrieve")
    chain.stage("keywords")
    for _ in range(3):
        chain.stage("retrieve")
    chain.stage("generate", candidates)
    for _ in range(revisions):
        chain.stage("revise")
    chain.stage("unit_tester")
    chain.stage("generate_unit_test")
    chain.stage("unit_tester")
    chain.stage("evaluate", int(chain.rng.choice([4, 5, 6], p=[0.2, 0.4, 0.4])))
    chain.stage("unit_tester")


@dataclass(slots=True)
class _Chain:
    """A workflow under construction: each stage waits for all calls of the one before."""

    rng: np.random.Generator
    kind: WorkflowClass
    workflow: str
    arrival_s: float
    deadline_s: float
    tool_gap_s: float
    requests: list[Request] = field(default_factory=list)
    before: tuple[str, ...] = ()
    ids: count[int] = field(default_factory=count)

    def stage(self, name: str, calls: int = 1) -> None:
        lengths = self.kind.stages[name]
        prompts = lengths.prompt.sample(self.rng, calls).tolist()
        outputs = lengths.output.sample(self.rng, calls).tolist()
        issued = [
            Request(
                request_id=f"{self.workflow}-{next(self.ids)}",
                arrival_s=self.arrival_s,
                prompt_tokens=prompt,
                output_tokens=output,
                workflow=self.workflow,
                stage=name,
                deadline_s=self.deadline_s,
                depends_on=self.before,
                gap_s=self.tool_gap_s if self.before else 0.0,
                prefix=f"{self.kind.name}/{name}",
                prefix_tokens=min(lengths.prefix_tokens, prompt),
            )
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        self.requests += issued
        self.before = tuple(request.request_id for request in issued)
