"""``trimtab bench urgency``: the agent's crowd, the paper's settings, and what the router costs.

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

from trimtab.core.benchmark import Case, Options, Progress
from trimtab.core.cache import cache_directory
from trimtab.core.policy import ServingPolicy
from trimtab.hosts.vllm.server import Server
from trimtab.hosts.vllm.small_model import small_model
from trimtab.urgency.paper import simulated_cases
from trimtab.urgency.router.bench import router_cases
from trimtab.urgency.text_to_sql import simulated
from trimtab.urgency.text_to_sql.agent import Answer
from trimtab.urgency.text_to_sql.crowd import (
    IN_TIME_SHARE,
    LOAD,
    Journey,
    Pace,
    Visit,
    assemble,
    measure_pace,
    tighten,
    visit_all,
)
from trimtab.urgency.text_to_sql.databases import Database, load
from trimtab.urgency.text_to_sql.figures import METRICS, Figures, Metric, figures
from trimtab.urgency.text_to_sql.sides import (
    FCFS,
    MIDDLEWARE,
    PAPER,
    PRIORITY,
    SEATS,
    URGENCY,
    Side,
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

Runs = dict[str, list[Figures]]
"""By side, the figures of each repeat; the repeats of all sides correspond."""


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
    if options.quick:
        real = _real_quickly(databases, options.seed, progress)
    else:
        cases += router_cases(options, progress)
        real = _real(databases, options.seed, progress)
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
    sides = BASELINES + OURS
    with (
        tempfile.TemporaryDirectory(prefix="trimtab-bench-") as logs,
        servers(sides, small_model(), Path(logs), progress) as started,
    ):
        pairs = list(zip(sides, started, strict=True))
        pace = _pace(pairs, databases, progress)
        runs: Runs = {side.name: [] for side in sides}
        for repeat in range(REPEATS):
            crowd = assemble(databases, pace, workflows=WORKFLOWS, seed=seed + repeat)
            # vLLM's own order goes first, for it says what a tight deadline is; the rest rotate.
            turn = 1 + repeat % (len(pairs) - 1)
            for number, (side, server) in enumerate([pairs[0], *pairs[turn:], *pairs[1:turn]]):
                done = (repeat + number / len(pairs)) / REPEATS
                progress(f"crowd {repeat + 1} of {REPEATS} under {side.title}", done)
                journeys = asyncio.run(visit_all(server, crowd, hints=side.hints))
                if side is FCFS:
                    journeys = tighten(journeys)
                    crowd = [journey.visit for journey in journeys]
                runs[side.name].append(figures(journeys))
    return runs


def _pace(
    pairs: Sequence[tuple[Side, Server]], databases: Sequence[Database], progress: Progress
) -> Pace:
    """The pace of the first server; the others are visited too, so that all are equally warm."""
    paces = []
    for side, server in pairs:
        progress(f"measuring how fast this machine is: {side.title}")
        paces.append(asyncio.run(measure_pace(server, databases, SEATS)))
    return paces[0]


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


def _cases(where: str, runs: Runs) -> list[Case]:
    """A case for each of our orders, each baseline and each metric."""
    return [
        _case(f"{where}/{ours.name}", metric, theirs, runs[theirs.name], runs[ours.name])
        for ours in OURS
        for theirs in (*BASELINES, SILENT)
        for metric in METRICS
        if ours.name in runs and theirs.name in runs
    ]


def _case(
    name: str, metric: Metric, theirs: Side, before: Sequence[Figures], after: Sequence[Figures]
) -> Case:
    pairs = [
        (max(metric.of(a), metric.floor), max(metric.of(b), metric.floor))
        for a, b in zip(before, after, strict=True)
    ]
    notes = (
        f"{before[0].workflows} workflows; deadlines such that serving by arrival meets "
        f"{IN_TIME_SHARE:.0%}; values below {metric.floor:g} count as {metric.floor:g}"
    )
    return Case.compare(
        name, metric.name, metric.unit, metric.better, theirs.name, pairs, notes=notes
    )
