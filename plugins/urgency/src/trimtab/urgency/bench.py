"""``trimtab bench urgency``: the agent's crowd, the paper's settings, what queue and router cost.

The crowd meets vLLM's own orders and urgency. On real engines every repeat is one crowd that visits
all servers in turn, so that a slow moment of the machine is shared; in the simulator every seed is
one crowd. The paper's clusters and traces are simulated; the router runs before a server without a
model.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cache import cache_directory
from trimtab.core.policy import ServingPolicy
from trimtab.hosts.vllm.small_model import small_model
from trimtab.urgency.paper import simulated_cases
from trimtab.urgency.queue_bench import queue_cases
from trimtab.urgency.router.bench import router_cases
from trimtab.urgency.text_to_sql import simulated
from trimtab.urgency.text_to_sql.agent import Answer
from trimtab.urgency.text_to_sql.crowd import (
    IN_TIME_SHARE,
    LOAD,
    Hints,
    Journey,
    Pace,
    Served,
    Visit,
    assemble,
    measure_pace,
    tighten,
    visit_all,
)
from trimtab.urgency.text_to_sql.databases import Database, load
from trimtab.urgency.text_to_sql.figures import DEADLINE_SCALE, METRICS, Figures, Metric, figures
from trimtab.urgency.text_to_sql.pool import (
    DISPATCH,
    LEAST_REQUESTS,
    ROUND_ROBIN,
    WHOLE,
    pool,
)
from trimtab.urgency.text_to_sql.pool import SEATS as POOL_SEATS
from trimtab.urgency.text_to_sql.sides import (
    FCFS,
    MIDDLEWARE,
    PAPER,
    PRIORITY,
    SEATS,
    URGENCY,
    servers,
)

BASELINES = (FCFS, PRIORITY)
OURS = (URGENCY, PAPER, MIDDLEWARE)
SILENT = replace(URGENCY, name="by-arrival", hints="nothing")
"""The server of `URGENCY` to clients that say nothing: what one start allows to compare with."""

_POLICIES: dict[str, Callable[[Sequence[Visit]], Callable[[], ServingPolicy] | None]] = {
    FCFS.name: lambda crowd: None,
    PRIORITY.name: simulated.static_priority,
    URGENCY.name: partial(simulated.urgency, order="edd"),
    PAPER.name: partial(simulated.urgency, order="urgency"),
}
"""The sides that the simulator knows, as the policy that orders a crowd's calls."""

WORKFLOWS = 32
REPEATS = 3
QUICK_WORKFLOWS = 6
QUICK_PACE = Pace({"interactive": 2.0, "report": 4.0}, capacity_per_s=0.8)
"""A guess instead of a measurement; `tighten` mends its deadlines."""
SIMULATED_SEEDS = 10
QUICK_SEEDS = 3
SIMULATED_WORKFLOWS = 100
LOADS = (1.2, LOAD)

ROUTES = (ROUND_ROBIN, LEAST_REQUESTS, DISPATCH, WHOLE)
POOL_WORKFLOWS = 64
"""With half as many the second worst of a crowd, which decides its deadline scale, was chance."""

POOL_LOAD = 0.8
POOL_IN_TIME_SHARE = 0.8
"""Serving by arrival and in turn misses 20 %."""

Runs = dict[str, list[Figures]]
"""By side, the figures of each repeat; the repeats of all sides correspond."""


class Contender(Protocol):
    """What a crowd can visit."""

    @property
    def name(self) -> str:
        """As in reports."""

    @property
    def title(self) -> str:
        """As people read it."""

    @property
    def hints(self) -> Hints:
        """What clients tell it of their calls."""


def run(options: Options, progress: Progress) -> list[Case]:
    """The cases of the simulator and of real engines."""
    databases = load(cache_directory() / "text-to-sql")
    loads, seeds = (LOADS[-1:], QUICK_SEEDS) if options.quick else (LOADS, SIMULATED_SEEDS)
    cases = []
    for rate in loads:
        progress(f"simulating at {rate:g} times the capacity")
        name = f"simulator/text-to-sql/load-{rate:g}"
        crowds = range(options.seed, options.seed + seeds)
        cases += _cases(name, _simulated(databases, crowds, rate))
    cases += simulated_cases(options, progress)
    cases += queue_cases(options, progress)
    if options.quick:
        real = _real_quickly(databases, options.seed, progress)
    else:
        cases += router_cases(options, progress)
        real = _real(databases, options.seed, progress)
        pooled = _pooled(databases, options.seed, progress)
        cases += _cases(
            "real/three-servers", pooled, ROUTES[:2], ROUTES[2:], share=POOL_IN_TIME_SHARE
        )
    return cases + _cases("real/text-to-sql", real)


def _real_quickly(databases: Sequence[Database], seed: int, progress: Progress) -> Runs:
    """One crowd at one server, twice: saying nothing, to be served by arrival, and saying all."""
    crowd = assemble(databases, QUICK_PACE, workflows=QUICK_WORKFLOWS, seed=seed)
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as logs,
        servers((URGENCY,), small_model(), Path(logs), progress) as (server,),
    ):
        progress("a small crowd that says nothing of its deadlines")
        theirs = tighten(asyncio.run(visit_all(server, crowd, hints="nothing")))
        progress("the same crowd, with deadlines")
        ours = asyncio.run(visit_all(server, [journey.visit for journey in theirs]))
    return {SILENT.name: [figures(theirs)], URGENCY.name: [figures(ours)]}


def _real(databases: Sequence[Database], seed: int, progress: Progress) -> Runs:
    """One server for each order."""
    sides = BASELINES + OURS
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as logs,
        servers(sides, small_model(), Path(logs), progress) as started,
    ):
        pairs = list(zip(sides, started, strict=True))
        pace = _pace(pairs, databases, SEATS, progress)[0]
        crowds = [
            assemble(databases, pace, workflows=WORKFLOWS, seed=seed + n) for n in range(REPEATS)
        ]
        return _rounds(pairs, crowds, IN_TIME_SHARE, progress)


def _pooled(databases: Sequence[Database], seed: int, progress: Progress) -> Runs:
    """Three unequal servers, and a router for each way to spread the calls."""
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as folder,
        pool(ROUTES, small_model(), Path(folder), progress) as started,
    ):
        pairs = list(zip(ROUTES, started, strict=True))
        pace = _pace(pairs, databases, sum(POOL_SEATS), progress)[-1]
        crowds = [
            assemble(databases, pace, workflows=POOL_WORKFLOWS, seed=seed + n, load=POOL_LOAD)
            for n in range(REPEATS)
        ]
        return _rounds(pairs, crowds, POOL_IN_TIME_SHARE, progress)


def _rounds(
    pairs: Sequence[tuple[Contender, Served]],
    crowds: Sequence[Sequence[Visit]],
    share: float,
    progress: Progress,
) -> Runs:
    """Every crowd visits all: first the one that knows no deadlines, the others in rotation.

    The first one's journeys say what a tight deadline is.
    """
    runs: Runs = {contender.name: [] for contender, _ in pairs}
    for repeat, crowd in enumerate(crowds):
        turn = 1 + repeat % (len(pairs) - 1)
        for number, (contender, server) in enumerate([pairs[0], *pairs[turn:], *pairs[1:turn]]):
            done = (repeat + number / len(pairs)) / len(crowds)
            progress(f"crowd {repeat + 1} of {len(crowds)} under {contender.title}", done)
            journeys = asyncio.run(visit_all(server, crowd, hints=contender.hints))
            if not number:
                journeys = tighten(journeys, share)
                crowd = [journey.visit for journey in journeys]
            runs[contender.name].append(figures(journeys))
    return runs


def _pace(
    pairs: Sequence[tuple[Contender, Served]],
    databases: Sequence[Database],
    seats: int,
    progress: Progress,
) -> list[Pace]:
    """How fast each is; all are visited alike, so that all are equally warm."""
    paces = []
    for contender, server in pairs:
        progress(f"measuring how fast this machine is: {contender.title}")
        paces.append(asyncio.run(measure_pace(server, databases, seats)))
    return paces


def _simulated(databases: Sequence[Database], seeds: Sequence[int], rate: float) -> Runs:
    pace = simulated.pace(databases)
    runs: Runs = {name: [] for name in _POLICIES}
    for seed in seeds:
        crowd = assemble(databases, pace, workflows=SIMULATED_WORKFLOWS, seed=seed, load=rate)
        for name, policy in _POLICIES.items():
            ended_s = simulated.finished_s(crowd, seed, policy(crowd))
            journeys = [Journey(v, ended_s[v.workflow], Answer(), 0) for v in crowd]
            if name == FCFS.name:
                journeys = tighten(journeys)
                crowd = [journey.visit for journey in journeys]
            runs[name].append(figures(journeys))
    return runs


def _cases(
    where: str,
    runs: Runs,
    baselines: Sequence[Contender] = (*BASELINES, SILENT),
    ours: Sequence[Contender] = OURS,
    share: float = IN_TIME_SHARE,
) -> list[Case]:
    """A case for each of ours, each baseline and each metric, as far as they were run."""
    return [
        _case(f"{where}/{our.name}", metric, their, runs[their.name], runs[our.name], share)
        for our in ours
        for their in baselines
        for metric in (*METRICS, DEADLINE_SCALE)
        if our.name in runs and their.name in runs
    ]


def _case(
    name: str,
    metric: Metric,
    theirs: Contender,
    before: Sequence[Figures],
    after: Sequence[Figures],
    share: float,
) -> Case:
    pairs = [
        (max(metric.of(a), metric.floor), max(metric.of(b), metric.floor))
        for a, b in zip(before, after, strict=True)
    ]
    notes = (
        f"{before[0].workflows} workflows; deadlines such that serving by arrival meets "
        f"{share:.0%}; values below {metric.floor:g} count as {metric.floor:g}"
    )
    return Case.compare(
        name, metric.name, metric.unit, metric.better, theirs.name, pairs, notes=notes
    )
